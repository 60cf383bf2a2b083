//! Memory for kernels: `f32` buffers on cache-line boundaries, on huge pages where they are large.

use std::fmt;
use std::ops::{Deref, DerefMut};

use memmap2::{MmapMut, MmapOptions};

/// Floats in a cache line.
pub(crate) const LINE: usize = 16;

/// Rounds `n` up to a multiple of `to`.
pub(crate) const fn round_up(n: usize, to: usize) -> usize {
    n.div_ceil(to) * to
}

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; LINE]);

enum Memory {
    Lines(Vec<Line>),
    Pages(MmapMut),
}

/// A zero-initialised `f32` buffer whose start is aligned to 64 bytes.
///
/// A vector load that straddles two cache lines costs two, which is a tenth of the speed of the
/// matrix product; hence not a plain `Vec`.
pub(crate) struct Buffer {
    memory: Memory,
    len: usize,
}

impl Buffer {
    /// `len` zeros.
    pub(crate) fn zeros(len: usize) -> Self {
        let lines = vec![Line([0.0; LINE]); len.div_ceil(LINE)];
        Self {
            memory: Memory::Lines(lines),
            len,
        }
    }

    /// `len` zeros on huge pages where the system has them; for weights, which are streamed.
    pub(crate) fn zeros_huge(len: usize) -> Self {
        const HUGE_PAGE_BYTES: usize = 2 << 20;
        let bytes = len * size_of::<f32>();
        if bytes < HUGE_PAGE_BYTES {
            return Self::zeros(len);
        }
        match MmapOptions::new()
            .len(round_up(bytes, HUGE_PAGE_BYTES))
            .map_anon()
        {
            Ok(pages) => {
                // Advice only: without huge pages the buffer works all the same.
                #[cfg(target_os = "linux")]
                let _ = pages.advise(memmap2::Advice::HugePage);
                Self {
                    memory: Memory::Pages(pages),
                    len,
                }
            }
            Err(_) => Self::zeros(len),
        }
    }

    /// A copy of `values`.
    pub(crate) fn from_slice(values: &[f32]) -> Self {
        let mut buffer = Self::zeros(values.len());
        buffer.copy_from_slice(values);
        buffer
    }

    /// Grows or shrinks to `len`; new elements are zero, old ones keep their place.
    pub(crate) fn resize(&mut self, len: usize) {
        match &mut self.memory {
            Memory::Lines(lines) => {
                lines.resize(len.div_ceil(LINE), Line([0.0; LINE]));
                self.len = len;
            }
            Memory::Pages(_) => {
                let mut grown = Self::zeros(len);
                let kept = len.min(self.len);
                grown[..kept].copy_from_slice(&self[..kept]);
                *self = grown;
            }
        }
    }

    /// Makes room for at least `len` elements; contents are unspecified.
    pub(crate) fn reserve(&mut self, len: usize) {
        if self.len < len {
            *self = Self::zeros(len);
        }
    }
}

impl Clone for Buffer {
    fn clone(&self) -> Self {
        Self::from_slice(self)
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({})", self.len)
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        let start = match &self.memory {
            Memory::Lines(lines) => lines.as_ptr().cast::<f32>(),
            Memory::Pages(pages) => pages.as_ptr().cast::<f32>(),
        };
        // SAFETY: both kinds of memory hold at least `len` initialised floats, aligned to 64 bytes.
        unsafe { std::slice::from_raw_parts(start, self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        let start = match &mut self.memory {
            Memory::Lines(lines) => lines.as_mut_ptr().cast::<f32>(),
            Memory::Pages(pages) => pages.as_mut_ptr().cast::<f32>(),
        };
        // SAFETY: as in `deref`, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(start, self.len) }
    }
}
