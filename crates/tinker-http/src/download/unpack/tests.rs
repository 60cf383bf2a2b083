//! Archives that are right, broken, and meant to do harm.

use std::io::Write as _;

use proptest::prelude::*;
use tar::{Builder, Header};
use tempfile::TempDir;

use super::*;

fn header(kind: EntryType, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(0o777);
    header
}

/// An entry whose name is taken as it is: the builder itself refuses harmful ones.
fn add(tar: &mut Builder<Vec<u8>>, kind: EntryType, name: &str, content: &[u8]) {
    let mut header = header(kind, content.len() as u64);
    let field = &mut header.as_mut_bytes()[..100];
    field[..name.len()].copy_from_slice(name.as_bytes());
    if kind == EntryType::Symlink || kind == EntryType::Link {
        header.as_mut_bytes()[157..162].copy_from_slice(b"/etc/");
    }
    header.set_cksum();
    tar.append(&header, content).unwrap();
}

fn archive(entries: &[(EntryType, &str, &[u8])]) -> Vec<u8> {
    let mut tar = Builder::new(Vec::new());
    for (kind, name, content) in entries {
        add(&mut tar, *kind, name, content);
    }
    tar.into_inner().unwrap()
}

fn limits() -> DownloadLimits {
    DownloadLimits {
        max_entries: 4,
        max_file_bytes: 100,
        max_total_bytes: 150,
    }
}

fn run(bytes: &[u8]) -> (TempDir, Result<Unpacked>) {
    let dir = TempDir::new().unwrap();
    let folder = dir.path().join("out");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(dir.path().join("archive"), bytes).unwrap();
    let result = unpack(&dir.path().join("archive"), &folder, &limits());
    (dir, result)
}

fn refused(bytes: &[u8]) -> String {
    let (dir, result) = run(bytes);
    let error = result.unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::Untrusted, "{error}");
    // Nothing beside the folder and the archive.
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    error.message().to_owned()
}

const FILE: EntryType = EntryType::Regular;
const FOLDER: EntryType = EntryType::Directory;

fn good() -> Vec<u8> {
    archive(&[
        (FOLDER, "./", b""),
        (FOLDER, "./sub/", b""),
        (FILE, "./sub/b.bin", b"bb"),
        (FILE, "a.bin", b"a"),
    ])
}

fn check_good(bytes: &[u8]) {
    let (dir, result) = run(bytes);
    let unpacked = result.unwrap();
    assert_eq!(unpacked.files, ["sub/b.bin", "a.bin"]);
    assert_eq!(unpacked.n_bytes, 3);
    let file = dir.path().join("out/sub/b.bin");
    assert_eq!(std::fs::read(&file).unwrap(), b"bb");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        let mode = std::fs::metadata(&file).unwrap().permissions().mode();
        assert_eq!(mode & 0o111, 0, "permissions of the archive are ignored");
    }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(bytes).unwrap();
    gzip.finish().unwrap()
}

#[test]
fn plain_gzip_and_zstd_archives_unpack() {
    check_good(&good());
    check_good(&gzip(&good()));
    check_good(&zstd::encode_all(good().as_slice(), 1).unwrap());
}

#[test]
fn long_names_unpack() {
    let name = format!("{}/{}", "d".repeat(90), "f".repeat(90));
    let mut tar = Builder::new(Vec::new());
    let content: &[u8] = b"x";
    tar.append_data(&mut header(FILE, 1), &name, content)
        .unwrap();

    let (_dir, result) = run(&tar.into_inner().unwrap());

    assert_eq!(result.unwrap().files, [name]);
}

#[test]
fn names_that_lead_out_are_refused() {
    for name in ["/etc/x", "../x", "a/../../x", "a\\..\\x"] {
        for kind in [FILE, FOLDER] {
            let said = refused(&archive(&[(kind, name, b"")]));
            assert!(said.starts_with("file name"), "{said}");
        }
    }
}

#[test]
fn links_devices_and_unknown_entries_are_refused() {
    for (kind, expected) in [
        (
            EntryType::Symlink,
            "the archive holds \"x\", which is a link",
        ),
        (EntryType::Link, "the archive holds \"x\", which is a link"),
        (
            EntryType::Fifo,
            "the archive holds \"x\", which is a device",
        ),
        (
            EntryType::Char,
            "the archive holds \"x\", which is a device",
        ),
        (
            EntryType::Block,
            "the archive holds \"x\", which is a device",
        ),
        (
            EntryType::new(b'?'),
            "the archive holds \"x\", which is neither a file nor a folder",
        ),
    ] {
        assert_eq!(refused(&archive(&[(kind, "x", b"")])), expected);
    }
}

#[test]
fn floods_are_refused() {
    let many: Vec<_> = (0..5).map(|n| n.to_string()).collect();
    let many: Vec<_> = many
        .iter()
        .map(|name| (FILE, name.as_str(), &b""[..]))
        .collect();
    assert_eq!(
        refused(&archive(&many)),
        "the archive holds more than 4 entries"
    );
    assert_eq!(
        refused(&archive(&[(FILE, "x", &[0; 101])])),
        "the archive holds x with 101 bytes, more than 100"
    );
    assert_eq!(
        refused(&archive(&[(FILE, "x", &[0; 100]), (FILE, "y", &[0; 51])])),
        "the archive holds more than 150 bytes"
    );
}

#[test]
fn a_name_of_many_megabytes_is_refused_before_it_is_read() {
    let mut tar = Builder::new(Vec::new());
    add(
        &mut tar,
        EntryType::GNULongName,
        "././@LongLink",
        &vec![b'a'; 64 << 20],
    );
    let said = refused(&gzip(&tar.into_inner().unwrap()));

    assert_eq!(
        said,
        "the archive cannot be read: its headers are too large"
    );
}

#[test]
fn names_given_twice_and_files_that_are_folders_are_refused() {
    for (names, expected) in [
        (["x", "./x"], "two files of one name: \"x\" and \"./x\""),
        (["x", "X"], "two files of one name: \"x\" and \"X\""),
        (["x", "x/y"], "\"x/y\" below \"x\", which is a file"),
        (["x/y", "X"], "\"x/y\" below \"X\", which is a file"),
        (["x", "y/"], "the file \"y/\", named like a folder"),
        (
            ["x", "sha256sums"],
            "\"sha256sums\", but SHA256SUMS is where the sums of the files are written",
        ),
    ] {
        let archive = archive(&names.map(|name| (FILE, name, &b"1"[..])));
        assert_eq!(refused(&archive), format!("the archive holds {expected}"));
    }
}

#[test]
fn archives_that_break_off_are_refused() {
    let whole = archive(&[(FILE, "x", &[7; 100])]);
    assert_eq!(refused(&whole[..560]), "the archive breaks off within x");

    let packed = gzip(&good());
    refused(&packed[..packed.len() - 4]);
    let mut corrupt = packed.clone();
    let at = corrupt.len() - 6;
    corrupt[at] ^= 1;
    refused(&corrupt);
}

#[test]
fn other_formats_are_named() {
    let (_dir, result) = run(b"PK\x03\x04rest");
    assert_eq!(*result.unwrap_err().kind(), ErrorKind::Unsupported);
    refused(&[b'x'; 600]);
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic_or_leave_its_folder(
        mut bytes in Just(good()),
        changes in prop::collection::vec((0_usize..2048, any::<u8>()), 1..20),
    ) {
        for (at, byte) in changes {
            bytes[at] = byte;
        }
        let (dir, _) = run(&bytes);
        prop_assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}
