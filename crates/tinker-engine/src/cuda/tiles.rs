//! How rows of sequences are shared out among the blocks of attention.

use super::ops::Heads;

/// Keys whose sums are one chain, as the kernels have it.
const CHUNK: usize = 256;

/// Rows of a block that takes few, as the kernels have it.
const FEW: usize = 4;

/// Blocks from which on a GPU has enough to do without more for the chunks of a row.
const MANY_BLOCKS: usize = 256;

/// Most floats that chunks of their own may leave behind.
const MOST_FLOATS: usize = 1 << 24;

/// Words of a tile.
const WORDS: usize = 6;

/// The rows of a sequence that go through attention, and where its keys and values are: for a cached
/// sequence addresses, for one that is trained offsets from those of the call.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows {
    pub(super) keys: u64,
    pub(super) values: u64,
    /// How far blocks of the model are apart in them.
    pub(super) stride: usize,
    /// Rows of the sequence.
    pub(super) n: usize,
    /// Tokens before them.
    pub(super) before: usize,
}

/// Tiles of rows, and how attention is launched for them.
#[derive(Debug, Default)]
pub(super) struct Tiles {
    /// As the kernel reads them.
    pub(super) words: Vec<u64>,
    /// Whether each has one token.
    pub(super) is_narrow: bool,
    /// Blocks that share the query heads of a key head.
    pub(super) parts: usize,
    /// Chunks of the longest sequence.
    pub(super) chunks: usize,
}

impl Tiles {
    /// The tiles of sequences whose rows follow each other; `height` is that of the kernel for many rows.
    pub(super) fn of(
        sequences: impl Iterator<Item = Rows> + Clone,
        heads: &Heads,
        height: usize,
    ) -> Self {
        let is_narrow = sequences.clone().all(|rows| rows.n == 1);
        let group = heads.n / heads.n_kv;
        let height = if is_narrow { FEW } else { height };
        let tokens = (height / group).max(1);
        let mut tiles = Self {
            is_narrow,
            parts: (tokens * group).div_ceil(height),
            ..Self::default()
        };
        let mut row = 0;
        for rows in sequences {
            for start in (0..rows.n).step_by(tokens) {
                let n = tokens.min(rows.n - start);
                let numbers = [rows.stride, row + start, n, rows.before + start];
                tiles.words.extend([rows.keys, rows.values]);
                tiles.words.extend(numbers.map(|n| n as u64));
            }
            row += rows.n;
            tiles.chunks = tiles.chunks.max((rows.before + rows.n).div_ceil(CHUNK));
        }
        tiles
    }

    pub(super) fn n(&self) -> usize {
        self.words.len() / WORDS
    }

    /// Floats that the chunks of `rows` rows leave behind where each gets a block of its own; 0 where one
    /// block takes all of them.
    pub(super) fn partial(&self, rows: usize, heads: &Heads) -> usize {
        let blocks = self.n() * heads.n_kv * self.parts;
        let floats = self.chunks * rows * heads.n * (heads.size + 2);
        let splits = self.chunks > 1 && blocks < MANY_BLOCKS && floats <= MOST_FLOATS;
        if splits { floats } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::{Rows, Tiles};
    use crate::cuda::ops::Heads;

    fn heads(n: usize, n_kv: usize) -> Heads {
        Heads {
            n,
            n_kv,
            size: 64,
            window: None,
            scale: 1.0,
            softcap: None,
        }
    }

    fn rows(n: usize, before: usize) -> Rows {
        Rows {
            keys: 0,
            values: 0,
            stride: 7,
            n,
            before,
        }
    }

    #[test]
    fn heads_of_a_group_share_a_tile() {
        let tiles = Tiles::of([rows(5, 3), rows(1, 9)].into_iter(), &heads(8, 2), 16);

        let tokens: Vec<_> = tiles
            .words
            .chunks(6)
            .map(|words| words[3..].to_vec())
            .collect();
        assert_eq!(tokens, [[0, 4, 3], [4, 1, 7], [5, 1, 9]]);
        assert_eq!((tiles.n(), tiles.parts, tiles.is_narrow), (3, 1, false));
    }

    #[test]
    fn a_group_that_is_larger_than_a_tile_is_shared_by_blocks() {
        let tiles = Tiles::of([rows(1, 600)].into_iter(), &heads(24, 2), 16);

        assert_eq!((tiles.n(), tiles.parts, tiles.is_narrow), (1, 3, true));
        assert_eq!(tiles.chunks, 3);
    }

    #[test]
    fn chunks_get_blocks_of_their_own_where_there_are_few() {
        let partial = |n: usize, before: usize, heads: &Heads| {
            let tiles = Tiles::of([rows(n, before)].into_iter(), heads, 16);
            tiles.partial(n, heads)
        };

        assert_eq!(partial(1, 255, &heads(4, 2)), 0);
        assert_eq!(partial(1, 256, &heads(4, 2)), 2 * 4 * 66);
        assert_eq!(partial(2048, 0, &heads(4, 2)), 0);
        assert_eq!(partial(200, 1 << 20, &heads(4, 2)), 0);
    }
}
