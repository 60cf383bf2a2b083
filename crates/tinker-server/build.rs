//! Packs the weights of the embedded model, which would be a quarter of the program.

use std::path::Path;

/// Where they are, seen from this package.
const WEIGHTS: &str = "../../models/nano/model.safetensors";
/// Highest of zstd's usual levels: half a second, once.
const LEVEL: i32 = 19;

#[expect(
    clippy::disallowed_methods,
    reason = "cargo says by the environment where a build script writes"
)]
fn main() -> std::io::Result<()> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed={WEIGHTS}");
    let weights = std::fs::read(WEIGHTS)?;
    let packed = zstd::encode_all(halves(&weights).as_slice(), LEVEL)?;
    let out = std::env::var_os("OUT_DIR").ok_or(std::io::ErrorKind::NotFound)?;
    std::fs::write(Path::new(&out).join("nano.zst"), packed)
}

/// The even bytes, then the odd ones. Weights are bf16: sign and exponent are in one byte of each, and
/// compress well only among themselves.
fn halves(bytes: &[u8]) -> Vec<u8> {
    let even = bytes.iter().step_by(2);
    let odd = bytes.iter().skip(1).step_by(2);
    even.chain(odd).copied().collect()
}
