//! Where the server is, and the addresses of calls on it.

use std::fmt;
use std::str::FromStr;

use url::{Host, Url};

use crate::error::{Error, ErrorKind};

/// The address of a server: scheme, host, port and a path that all calls share.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct BaseUrl(Url);

impl BaseUrl {
    /// The address of a call: `route` below the base, then `segments`, each one escaped.
    pub(crate) fn join<'a>(&self, route: &str, segments: impl IntoIterator<Item = &'a str>) -> Url {
        let mut url = self.0.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty();
            path.extend(route.split('/').filter(|part| !part.is_empty()));
            path.extend(segments);
        }
        url
    }

    /// The call at `url` of a server that is here now.
    pub(crate) fn place(&self, url: &Url) -> Url {
        let mut placed = self.0.clone();
        placed.set_path(url.path());
        placed.set_query(url.query());
        placed
    }

    /// Whether the server is on this machine.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        match self.0.host() {
            Some(Host::Domain(name)) => name == "localhost",
            Some(Host::Ipv4(ip)) => ip.is_loopback(),
            Some(Host::Ipv6(ip)) => ip.is_loopback(),
            None => false,
        }
    }

    /// Whether nobody can read on the way what is sent there.
    pub(crate) fn is_encrypted(&self) -> bool {
        self.0.scheme() == "https"
    }

    /// Whether a key sent there can be read on the way.
    pub(crate) fn is_exposed(&self) -> bool {
        self.0.scheme() == "http" && !self.is_loopback()
    }
}

impl FromStr for BaseUrl {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let fault = |why: &str| {
            // A malformed address may hold a password, so it is shown only up to an `@`.
            let shown = text.rsplit('@').next().unwrap_or_default();
            Error::new(
                ErrorKind::InvalidRequest,
                format!("base URL {shown:?} {why}"),
            )
        };
        let mut url = Url::parse(text.trim())
            .map_err(|error| fault(&format!("is not an address: {error}")))?;
        if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
            return Err(fault("must start with http:// or https:// and name a host"));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(fault("must not hold a user or password"));
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(fault("must not hold a query or fragment"));
        }
        let path = url.path().trim_end_matches('/').to_owned();
        url.set_path(&path);
        Ok(Self(url))
    }
}

impl fmt::Display for BaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.as_str().trim_end_matches('/'))
    }
}

impl fmt::Debug for BaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BaseUrl({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base(text: &str) -> BaseUrl {
        text.parse().unwrap()
    }

    #[test]
    fn trailing_slashes_default_ports_and_case_do_not_matter() {
        assert_eq!(
            base("http://127.0.0.1:8000/"),
            base("http://127.0.0.1:8000")
        );
        assert_eq!(base("HTTPS://Host:443/a//"), base("https://host/a"));
        assert_eq!(base("https://host/a/").to_string(), "https://host/a");
        assert_eq!(base("http://127.0.0.1:80/").to_string(), "http://127.0.0.1");
    }

    #[test]
    fn keeps_the_path_and_the_colons_of_ids_and_escapes_the_rest() {
        let url = base("https://host/services/prod").join(
            "/api/v1/training_runs",
            ["S1:train:0", "a/b?c#d", "weights", "0001"],
        );

        assert_eq!(
            url.as_str(),
            "https://host/services/prod/api/v1/training_runs/S1:train:0/a%2Fb%3Fc%23d/weights/0001"
        );
    }

    #[test]
    fn a_moved_call_keeps_path_and_query() {
        let mut url = base("http://127.0.0.1:1").join("/api/v1/checkpoints", ["a/b"]);
        url.set_query(Some("limit=1"));

        let placed = base("http://127.0.0.1:2").place(&url);

        assert_eq!(
            placed.as_str(),
            "http://127.0.0.1:2/api/v1/checkpoints/a%2Fb?limit=1"
        );
    }

    #[test]
    fn refuses_what_is_not_a_server() {
        for (text, part) in [
            ("localhost:8000", "must start with http:// or https://"),
            ("host", "is not an address"),
            ("ftp://host", "must start with http:// or https://"),
            ("http://u:secret@host", "must not hold a user or password"),
            ("http://host?x=1", "must not hold a query"),
        ] {
            let message = text.parse::<BaseUrl>().unwrap_err().to_string();
            assert!(message.contains(part), "{text}: {message}");
            assert!(!message.contains("secret"), "{message}");
        }
    }

    #[test]
    fn knows_this_machine() {
        for text in ["http://localhost:1", "http://127.0.0.9", "http://[::1]:1"] {
            assert!(
                base(text).is_loopback() && !base(text).is_exposed(),
                "{text}"
            );
        }
        assert!(base("http://10.0.0.1").is_exposed());
        assert!(!base("https://10.0.0.1").is_exposed());
    }
}
