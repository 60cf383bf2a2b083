//! Splitting the data of one call into requests of bounded size.

use tinker_types::{ClientConfig, Datum};

/// Splits greedily, in order: a request holds at most `fwdbwd_max_chunk_len` data and
/// `fwdbwd_max_chunk_bytes_count` estimated bytes, and at least one datum however large.
pub(crate) fn split(data: Vec<Datum>, config: &ClientConfig) -> Vec<Vec<Datum>> {
    let max_len = usize::try_from(config.fwdbwd_max_chunk_len).unwrap_or(usize::MAX);
    let max_bytes = usize::try_from(config.fwdbwd_max_chunk_bytes_count).unwrap_or(usize::MAX);
    let mut chunks = Vec::new();
    let mut chunk = Vec::new();
    let mut n_bytes = 0_usize;
    for datum in data {
        let size = datum.estimated_bytes();
        let is_full = chunk.len() >= max_len || n_bytes.saturating_add(size) > max_bytes;
        if is_full && !chunk.is_empty() {
            chunks.push(std::mem::take(&mut chunk));
            n_bytes = 0;
        }
        n_bytes = n_bytes.saturating_add(size);
        chunk.push(datum);
    }
    if !chunk.is_empty() {
        chunks.push(chunk);
    }
    chunks
}

#[cfg(test)]
mod tests {
    use tinker_types::ModelInput;

    use super::*;

    /// A datum of `n` tokens counts 16 bytes a token.
    fn datum(n: usize) -> Datum {
        let input = ModelInput::from_tokens(vec![1; n]);
        Datum::cross_entropy(input, vec![1; n], vec![1.0; n]).unwrap()
    }

    fn check(lengths: &[usize], expected: &[usize]) {
        let data: Vec<Datum> = lengths.iter().map(|&n| datum(n)).collect();
        let chunks = split(data.clone(), &ClientConfig::default());

        let sizes: Vec<usize> = chunks.iter().map(Vec::len).collect();
        assert_eq!(sizes, expected);
        assert_eq!(chunks.concat(), data);
    }

    #[test]
    fn splits_by_number() {
        check(&[], &[]);
        check(&[1; 1024], &[1024]);
        check(&[1; 1025], &[1024, 1]);
        check(&[1; 2049], &[1024, 1024, 1]);
    }

    #[test]
    fn splits_by_bytes_and_never_sends_an_empty_request() {
        check(&[6250; 51], &[50, 1]);
        check(&[400_000], &[1]);
        check(&[1, 400_000, 1], &[1, 1, 1]);
        check(&[400_000, 400_000], &[1, 1]);
    }
}
