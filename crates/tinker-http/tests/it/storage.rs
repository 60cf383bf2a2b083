//! A storage that speaks ranges over plain TCP, and fails as it is told.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// What a request gets instead of what it asks for.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Fault {
    /// Nothing is wrong.
    Good,
    /// The connection ends after so many bytes of the body.
    Cut(usize),
    /// A refusal.
    Status(u16),
    /// Another place.
    Redirect(String),
    /// The whole file, whatever was asked for.
    NoRange,
    /// The whole file without its length, cut after so many bytes.
    NoLength(usize),
    /// Another file under the same name.
    Changed,
}

/// A request as it came.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    /// Path and query.
    pub(crate) target: String,
    pub(crate) range: Range<usize>,
    /// All of the head, in lower case.
    pub(crate) head: String,
}

type Faults = dyn Fn(usize, &Asked) -> Fault + Send + Sync;

pub(crate) struct Storage {
    pub(crate) url: String,
    asked: Arc<Mutex<Vec<Asked>>>,
    faults: Arc<Mutex<Box<Faults>>>,
}

impl Storage {
    /// Serves files by path.
    pub(crate) fn start(files: &[(&str, Vec<u8>)]) -> Self {
        let files: BTreeMap<String, Vec<u8>> = files
            .iter()
            .map(|(path, bytes)| ((*path).to_owned(), bytes.clone()))
            .collect();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let faults: Arc<Mutex<Box<Faults>>> = Arc::new(Mutex::new(Box::new(|_, _| Fault::Good)));
        let (log, rules, files) = (Arc::clone(&asked), Arc::clone(&faults), Arc::new(files));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (log, rules) = (Arc::clone(&log), Arc::clone(&rules));
                let files = Arc::clone(&files);
                // A client that leaves is no fault of the storage.
                std::thread::spawn(move || drop(serve(stream.unwrap(), &files, &log, &rules)));
            }
        });
        Self { url, asked, faults }
    }

    /// Fails as `faults` says of the n-th request, from 0.
    pub(crate) fn fail(&self, faults: impl Fn(usize, &Asked) -> Fault + Send + Sync + 'static) {
        self.asked.lock().unwrap().clear();
        *self.faults.lock().unwrap() = Box::new(faults);
    }

    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }
}

fn serve(
    mut stream: TcpStream,
    files: &BTreeMap<String, Vec<u8>>,
    log: &Mutex<Vec<Asked>>,
    faults: &Mutex<Box<Faults>>,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head)? == 0 {
            return Ok(());
        }
    }
    let asked = read_head(&head);
    let fault = {
        let mut log = log.lock().unwrap();
        let n = log.len();
        log.push(asked.clone());
        faults.lock().unwrap()(n, &asked)
    };
    let path = asked.target.split('?').next().unwrap();
    match (fault, files.get(path)) {
        (Fault::Status(status), _) => answer(&mut stream, status, "", &[], None),
        (Fault::Redirect(place), _) => answer(
            &mut stream,
            302,
            &format!("location: {place}\r\n"),
            &[],
            None,
        ),
        (_, None) => answer(&mut stream, 404, "", &[], None),
        (fault, Some(bytes)) => send(&mut stream, &fault, bytes, &asked.range),
    }
}

fn send(
    stream: &mut TcpStream,
    fault: &Fault,
    bytes: &[u8],
    range: &Range<usize>,
) -> std::io::Result<()> {
    let (start, end) = (range.start, range.end.min(bytes.len()));
    match fault {
        Fault::NoRange => return answer(stream, 200, "", bytes, None),
        Fault::NoLength(n) => {
            stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")?;
            let part = &bytes[..(*n).min(bytes.len())];
            write!(stream, "{:x}\r\n", part.len())?;
            stream.write_all(part)?;
            let end: &[u8] = if *n < bytes.len() {
                b""
            } else {
                b"\r\n0\r\n\r\n"
            };
            return stream.write_all(end);
        }
        _ if bytes.is_empty() => {
            return answer(stream, 416, "content-range: bytes */0\r\n", &[], None);
        }
        _ => {}
    }
    let changed: Vec<u8> = bytes.iter().map(|byte| !byte).collect();
    let (bytes, tag) = match fault {
        Fault::Changed => (changed.as_slice(), "v2"),
        _ => (bytes, "v1"),
    };
    let last = end - 1;
    let size = bytes.len();
    let headers = format!("etag: \"{tag}\"\r\ncontent-range: bytes {start}-{last}/{size}\r\n");
    let cut = match fault {
        Fault::Cut(n) => Some(*n),
        _ => None,
    };
    answer(stream, 206, &headers, &bytes[start..end], cut)
}

fn answer(
    stream: &mut TcpStream,
    status: u16,
    headers: &str,
    body: &[u8],
    cut: Option<usize>,
) -> std::io::Result<()> {
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 {status} X\r\n{headers}content-length: {length}\r\nconnection: close\r\n\r\n"
    )?;
    stream.write_all(&body[..cut.unwrap_or(length).min(length)])
}

fn read_head(head: &str) -> Asked {
    let target = head.split(' ').nth(1).unwrap().to_owned();
    let head = head.to_lowercase();
    let range = head
        .lines()
        .find_map(|line| line.strip_prefix("range: bytes="));
    let range = range.and_then(|range| range.split_once('-'));
    let (first, last) = range.unwrap_or(("0", "999999999"));
    Asked {
        target,
        range: first.parse().unwrap()..last.parse::<usize>().unwrap() + 1,
        head,
    }
}
