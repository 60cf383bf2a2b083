//! Reading a small document at an address that a server points to: without the key.

use reqwest::header::ACCEPT;
use url::Url;

use crate::call::{Answer, JSON};
use crate::client::Client;
use crate::error::{Error, ErrorKind, Result};
use crate::pools::TrafficClass;
use crate::send::{no_answer, read};

impl Client {
    /// Reads a document at `place` in one attempt. Neither the key nor the headers of a gateway go
    /// there: the address itself is the permission.
    pub(crate) async fn fetch_document(&self, place: &Url) -> Result<Answer> {
        let host = place.host_str().unwrap_or("nowhere").to_owned();
        let encrypted = place.scheme() == "https";
        if !encrypted && (place.scheme() != "http" || self.base_url().is_encrypted()) {
            return Err(Error::new(
                ErrorKind::Untrusted,
                format!(
                    "the server points to {}://{host}, which is not encrypted",
                    place.scheme()
                ),
            ));
        }
        let lease = self.inner().pools.get(TrafficClass::Rest)?;
        let recorder = self.inner().recorder.as_ref();
        let take = recorder.map(|recorder| recorder.begin_elsewhere(place));
        let fetched = async {
            let request = lease.client.get(place.clone()).header(ACCEPT, JSON);
            let response = request.send().await;
            read(response.map_err(no_answer)?).await
        };
        let fetched = fetched.await;
        if let Some(take) = take {
            take.end(&fetched).await;
        }
        let answer = fetched.map_err(|none| none.error.with_call("GET", &host))?;
        if answer.is_success() {
            return Ok(answer);
        }
        // Its body may repeat the signed address, so it is not shown.
        let refusal = Error::of_status(answer.status, b"the storage refuses", answer.retry_after);
        Err(refusal.with_call("GET", &host))
    }
}
