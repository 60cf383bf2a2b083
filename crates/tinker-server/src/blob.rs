//! Files handed out whole or in ranges, alone or as an archive that is made while it is read.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use axum::body::Body;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use tokio::sync::mpsc;

use crate::bundle::Manifest;
use crate::clock::{Millis, millis};

/// Bytes read at a time.
const CHUNK: usize = 256 << 10;
/// Chunks read ahead of the network.
const READ_AHEAD: usize = 4;
/// Size of a block of a tar archive.
const BLOCK: usize = 512;

#[derive(Debug, Clone)]
enum Piece {
    Bytes(Bytes),
    File { path: PathBuf, len: u64 },
}

impl Piece {
    const fn len(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File { len, .. } => *len,
        }
    }
}

/// Something to read: pieces one after the other, of known length and content.
#[derive(Debug, Clone)]
pub(crate) struct Blob {
    pieces: Vec<Piece>,
    content_type: &'static str,
    /// Changes when the content does.
    tag: String,
}

impl Blob {
    /// One file of a bundle; `None` if the bundle has none of that name.
    pub(crate) fn of_file(dir: &Path, manifest: &Manifest, name: &str) -> Option<Self> {
        let entry = manifest.files.get(name)?;
        Some(Self {
            pieces: vec![Piece::File {
                path: dir.join(name),
                len: entry.size_bytes,
            }],
            content_type: "application/octet-stream",
            tag: entry.sha256.clone(),
        })
    }

    /// All files of a bundle as a tar archive.
    pub(crate) fn archive(dir: &Path, manifest: &Manifest) -> Self {
        let modified = millis(&manifest.created_at).unwrap_or(0);
        let mut pieces = Vec::new();
        let mut digests = String::new();
        for (name, entry) in &manifest.files {
            pieces.push(Piece::Bytes(
                tar_header(name, entry.size_bytes, modified).into(),
            ));
            pieces.push(Piece::File {
                path: dir.join(name),
                len: entry.size_bytes,
            });
            let n_over = (entry.size_bytes % BLOCK as u64) as usize;
            let n_padding = (BLOCK - n_over) % BLOCK;
            pieces.push(Piece::Bytes(vec![0; n_padding].into()));
            digests.push_str(&entry.sha256);
        }
        // Two empty blocks end an archive.
        pieces.push(Piece::Bytes(vec![0; 2 * BLOCK].into()));
        Self {
            pieces,
            content_type: "application/x-tar",
            tag: blake3::hash(digests.as_bytes()).to_hex().to_string(),
        }
    }

    /// Text that is at hand.
    pub(crate) fn of_json(text: Vec<u8>) -> Self {
        Self {
            tag: blake3::hash(&text).to_hex().to_string(),
            pieces: vec![Piece::Bytes(text.into())],
            content_type: "application/json",
        }
    }

    fn len(&self) -> u64 {
        self.pieces.iter().map(Piece::len).sum()
    }

    /// Answers a request for it: whole, or the range that the headers ask for.
    pub(crate) fn respond(self, headers: &HeaderMap) -> Response {
        let len = self.len();
        let tag = format!("\"{}\"", self.tag);
        let always = [
            (header::ACCEPT_RANGES, "bytes".to_owned()),
            (header::ETAG, tag.clone()),
            (header::CONTENT_TYPE, self.content_type.to_owned()),
        ];
        let text = |name| headers.get(name).and_then(|v| v.to_str().ok());
        let is_same = text(header::IF_RANGE).is_none_or(|given| given == tag);
        match asked_range(text(header::RANGE).filter(|_| is_same), len) {
            Asked::Everything => {
                let n_bytes = [(header::CONTENT_LENGTH, len.to_string())];
                (always, n_bytes, self.read(0..len)).into_response()
            }
            Asked::Part(range) => {
                let part = [
                    (
                        header::CONTENT_LENGTH,
                        (range.end - range.start).to_string(),
                    ),
                    (
                        header::CONTENT_RANGE,
                        format!("bytes {}-{}/{len}", range.start, range.end - 1),
                    ),
                ];
                (StatusCode::PARTIAL_CONTENT, always, part, self.read(range)).into_response()
            }
            Asked::Nothing => {
                let size = [(header::CONTENT_RANGE, format!("bytes */{len}"))];
                (StatusCode::RANGE_NOT_SATISFIABLE, size).into_response()
            }
        }
    }

    /// Streams a range. A file that cannot be read breaks the stream off, which clients see.
    fn read(self, range: Range<u64>) -> Body {
        let (sender, receiver) = mpsc::channel(READ_AHEAD);
        tokio::task::spawn_blocking(move || {
            if let Err(error) = self.send(range, &sender) {
                tracing::warn!(%error, "cannot read a file that is being downloaded");
                // The client may be gone.
                let _ = sender.blocking_send(Err(error));
            }
        });
        Body::from_stream(futures_util::stream::unfold(
            receiver,
            async |mut receiver| {
                let chunk: io::Result<Bytes> = receiver.recv().await?;
                Some((chunk, receiver))
            },
        ))
    }

    fn send(self, range: Range<u64>, to: &mpsc::Sender<io::Result<Bytes>>) -> io::Result<()> {
        let mut start = 0;
        for piece in self.pieces {
            let end = start + piece.len();
            let (from, until) = (range.start.max(start), range.end.min(end));
            if from < until && !send_piece(piece, from - start..until - start, to)? {
                return Ok(());
            }
            start = end;
        }
        Ok(())
    }
}

/// Sends a range of a piece; false once nobody reads any more.
fn send_piece(
    piece: Piece,
    range: Range<u64>,
    to: &mpsc::Sender<io::Result<Bytes>>,
) -> io::Result<bool> {
    match piece {
        Piece::Bytes(bytes) => {
            let part = bytes.slice(range.start as usize..range.end as usize);
            Ok(to.blocking_send(Ok(part)).is_ok())
        }
        Piece::File { path, .. } => {
            let mut file = File::open(path)?;
            file.seek(SeekFrom::Start(range.start))?;
            let mut left = range.end - range.start;
            while left > 0 {
                let mut chunk = vec![0; CHUNK.min(left as usize)];
                file.read_exact(&mut chunk)?;
                left -= chunk.len() as u64;
                if to.blocking_send(Ok(chunk.into())).is_err() {
                    return Ok(false);
                }
            }
            Ok(true)
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Asked {
    Everything,
    Part(Range<u64>),
    /// A range beyond the end.
    Nothing,
}

/// Reads a `Range` header (RFC 9110, section 14.1.2). Several ranges, and what is none, are answered
/// with everything, as the standard allows.
fn asked_range(text: Option<&str>, len: u64) -> Asked {
    let parts = text
        .and_then(|text| text.trim().strip_prefix("bytes="))
        .and_then(|range| range.split_once('-'));
    let Some((first, last)) = parts else {
        return Asked::Everything;
    };
    let number = |text: &str| text.trim().parse::<u64>();
    let range = match (number(first), number(last)) {
        (Ok(first), Ok(last)) if first <= last => first..last.saturating_add(1).min(len),
        (Ok(first), Err(_)) if last.trim().is_empty() => first..len,
        (Err(_), Ok(n)) if first.trim().is_empty() => len.saturating_sub(n)..len,
        _ => return Asked::Everything,
    };
    if range.start < range.end {
        Asked::Part(range)
    } else {
        Asked::Nothing
    }
}

/// The header of a file in a tar archive (POSIX.1-1988 ustar).
fn tar_header(name: &str, n_bytes: u64, modified: Millis) -> Vec<u8> {
    let mut header = vec![0_u8; BLOCK];
    let mut put = |at: usize, text: &str| {
        header[at..at + text.len()].copy_from_slice(text.as_bytes());
    };
    put(0, name.get(..name.len().min(100)).unwrap_or_default());
    put(100, "0000644\0");
    put(108, "0000000\0");
    put(116, "0000000\0");
    put(124, &format!("{n_bytes:011o}\0"));
    put(136, &format!("{:011o}\0", modified.max(0) / 1000));
    // The checksum counts its own field as spaces.
    put(148, "        ");
    put(156, "0");
    put(257, "ustar\x0000");
    let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_as_the_standard_says() {
        let cases = [
            ("bytes=0-3", Asked::Part(0..4)),
            ("bytes=5-", Asked::Part(5..10)),
            ("bytes=-4", Asked::Part(6..10)),
            ("bytes=-40", Asked::Part(0..10)),
            ("bytes=8-99", Asked::Part(8..10)),
            ("bytes=10-", Asked::Nothing),
            ("bytes=-0", Asked::Nothing),
            ("bytes=3-2", Asked::Everything),
            ("bytes=0-1,3-4", Asked::Everything),
            ("lines=0-1", Asked::Everything),
            ("bytes=a-b", Asked::Everything),
        ];
        for (text, expected) in cases {
            assert_eq!(asked_range(Some(text), 10), expected, "{text}");
        }
        assert_eq!(asked_range(None, 10), Asked::Everything);
    }

    #[tokio::test]
    async fn every_range_is_the_same_part_of_the_whole() {
        let dir = tempfile::tempdir().unwrap();
        let content: Vec<u8> = (0..700_000_u32).map(|i| i as u8).collect();
        std::fs::write(dir.path().join("f"), &content).unwrap();
        let blob = Blob {
            pieces: vec![
                Piece::Bytes(Bytes::from_static(b"head")),
                Piece::File {
                    path: dir.path().join("f"),
                    len: content.len() as u64,
                },
                Piece::Bytes(Bytes::from_static(b"tail")),
            ],
            content_type: "x/y",
            tag: "t".into(),
        };
        let whole = [b"head", &content[..], b"tail"].concat();
        let len = blob.len();
        assert_eq!(len, whole.len() as u64);

        for range in [0..len, 0..2, 3..6, 5..300_000, len - 3..len, len - 700..len] {
            let body = blob.clone().read(range.clone());
            let read = axum::body::to_bytes(body, usize::MAX).await.unwrap();
            let expected = &whole[range.start as usize..range.end as usize];
            assert!(read == expected, "{range:?}");
        }
    }

    #[tokio::test]
    async fn a_file_that_is_shorter_than_promised_breaks_the_answer_off() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("f"), b"abc").unwrap();
        let blob = Blob {
            pieces: vec![Piece::File {
                path: dir.path().join("f"),
                len: 5,
            }],
            content_type: "x/y",
            tag: "t".into(),
        };

        assert!(axum::body::to_bytes(blob.read(0..5), 100).await.is_err());
    }
}
