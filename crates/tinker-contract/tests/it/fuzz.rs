//! Mutated requests, a few seconds of them; `cargo xtask fuzz` sends more. In a process of their own, so
//! that its panics and its memory are theirs.

use std::process::Command;

#[test]
fn mutated_requests_are_answered_without_a_panic_or_much_memory() {
    let ran = Command::new(env!("CARGO_BIN_EXE_fuzz"))
        .args(["1", "cases", "3000"])
        .output()
        .unwrap();

    let printed = String::from_utf8_lossy(&ran.stdout);
    assert!(ran.status.success(), "{printed}");
    println!("{printed}");
}
