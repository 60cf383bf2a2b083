//! HTTP/1.1 messages as bytes: just enough to pass them on and to break them.

use std::io;

use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;

/// A request or an answer with its whole body.
#[derive(Debug, Clone)]
pub(super) struct Message {
    first_line: String,
    /// Name in lower case, value.
    headers: Vec<(String, String)>,
    pub(super) body: Vec<u8>,
}

impl Message {
    /// Reads a complete message; a body in chunks is put together.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let n_head = head_length(bytes)?;
        let mut message = Self::parse_head(bytes.get(..n_head)?)?;
        let body = bytes.get(n_head..)?;
        message.body = if message.header("transfer-encoding").is_some() {
            message
                .headers
                .retain(|(name, _)| name != "transfer-encoding");
            let body = dechunk(body)?;
            let length = body.len().to_string();
            message.headers.push(("content-length".to_owned(), length));
            body
        } else {
            body.to_vec()
        };
        Some(message)
    }

    fn parse_head(head: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(head).ok()?;
        let mut lines = text.split("\r\n").filter(|line| !line.is_empty());
        let first_line = lines.next()?.to_owned();
        let headers = lines
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
            .collect();
        Some(Self {
            first_line,
            headers,
            body: Vec::new(),
        })
    }

    /// A header, by lower-case name.
    fn header(&self, name: &str) -> Option<&str> {
        let mut headers = self.headers.iter();
        headers
            .find(|(other, _)| other == name)
            .map(|(_, value)| &value[..])
    }

    /// The path of a request, without its query.
    pub(super) fn path(&self) -> &str {
        let target = self.first_line.split(' ').nth(1).unwrap_or_default();
        target.split('?').next().unwrap_or_default()
    }

    /// The same message with these headers, and no others of their names.
    pub(super) fn with_headers(&self, headers: &[(&str, &str)]) -> Self {
        let mut message = self.clone();
        message
            .headers
            .retain(|(name, _)| headers.iter().all(|(other, _)| name != other));
        for (name, value) in headers {
            message
                .headers
                .push(((*name).to_owned(), (*value).to_owned()));
        }
        message
    }

    /// First line, headers and the empty line after them.
    pub(super) fn head_bytes(&self) -> Vec<u8> {
        let mut head = format!("{}\r\n", self.first_line);
        for (name, value) in &self.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        head.into_bytes()
    }

    /// The whole message.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        [&self.head_bytes()[..], &self.body].concat()
    }

    /// The message with its body in chunks of `n` bytes; without the last chunk it never ends.
    pub(super) fn chunked(&self, n: usize, ends: bool) -> Vec<u8> {
        let mut message = self.with_headers(&[("transfer-encoding", "chunked")]);
        message.headers.retain(|(name, _)| name != "content-length");
        let mut bytes = message.head_bytes();
        for chunk in self.body.chunks(n.max(1)) {
            bytes.extend(format!("{:x}\r\n", chunk.len()).into_bytes());
            bytes.extend(chunk);
            bytes.extend(b"\r\n");
        }
        if ends {
            bytes.extend(b"0\r\n\r\n");
        }
        bytes
    }

    /// The message with at most `n` bytes of its body, which ends where the connection does.
    pub(super) fn without_length(&self, n: usize) -> Vec<u8> {
        let mut message = self.with_headers(&[("connection", "close")]);
        message.headers.retain(|(name, _)| name != "content-length");
        message.body.truncate(n);
        message.to_bytes()
    }
}

/// Reads the next request of a connection; `None` at its end. `buffer` keeps what follows it.
pub(super) async fn read(
    stream: &mut TcpStream,
    buffer: &mut Vec<u8>,
) -> io::Result<Option<Message>> {
    loop {
        if let Some(request) = take(buffer)? {
            return Ok(Some(request));
        }
        if stream.read_buf(buffer).await? == 0 {
            return Ok(None);
        }
    }
}

/// Takes a complete request off the buffer, if one is there.
fn take(buffer: &mut Vec<u8>) -> io::Result<Option<Message>> {
    let Some(n_head) = head_length(buffer) else {
        return Ok(None);
    };
    let head = Message::parse_head(&buffer[..n_head]).ok_or(io::ErrorKind::InvalidData)?;
    let length = head.header("content-length").map_or(Ok(0), str::parse);
    let n_body: usize = length.map_err(|_| io::ErrorKind::InvalidData)?;
    if buffer.len() < n_head + n_body {
        return Ok(None);
    }
    let rest = buffer.split_off(n_head + n_body);
    let body = buffer.split_off(n_head);
    *buffer = rest;
    Ok(Some(Message { body, ..head }))
}

/// Bytes up to and with the empty line that ends a head.
fn head_length(bytes: &[u8]) -> Option<usize> {
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n")?;
    Some(end + 4)
}

/// The body of chunks.
fn dechunk(mut bytes: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let end = bytes.windows(2).position(|window| window == b"\r\n")?;
        let size = std::str::from_utf8(bytes.get(..end)?).ok()?;
        let size = usize::from_str_radix(size.split(';').next()?.trim(), 16).ok()?;
        if size == 0 {
            return Some(body);
        }
        let start = end + 2;
        body.extend_from_slice(bytes.get(start..start + size)?);
        bytes = bytes.get(start + size + 2..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_chunking() {
        let whole = b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\nhello world";
        let message = Message::parse(whole).unwrap();

        let again = Message::parse(&message.chunked(4, true)).unwrap();

        assert_eq!(again.body, b"hello world");
        assert_eq!(again.header("content-length"), Some("11"));
        assert!(Message::parse(&message.chunked(4, false)).is_none());
    }

    #[test]
    fn requests_are_taken_one_by_one() {
        let mut buffer = b"POST /a?x=1 HTTP/1.1\r\nContent-Length: 2\r\n\r\nhiGET /b".to_vec();

        let first = take(&mut buffer).unwrap().unwrap();

        assert_eq!((first.path(), &first.body[..]), ("/a", &b"hi"[..]));
        assert_eq!(buffer, b"GET /b");
        assert!(take(&mut buffer).unwrap().is_none());
    }
}
