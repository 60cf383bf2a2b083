//! What servers other than the official one say differently, made equal.

use tinker_types::{SampleRequest, SampleResponse};

/// Completes the prompt's log-probabilities of servers that leave out the first token's, which has
/// none, as SkyRL's do.
pub(crate) fn align_prompt_logprobs(response: &mut SampleResponse, request: &SampleRequest) {
    let (Some(rows), Ok(n_tokens)) = (&mut response.prompt_logprobs, request.prompt.length())
    else {
        return;
    };
    if request.prompt_logprobs_last_n.is_none() && rows.len() + 1 == n_tokens {
        rows.insert(0, None);
    }
}
