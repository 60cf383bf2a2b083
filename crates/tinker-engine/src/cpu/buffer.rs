//! Memory for kernels: `f32` buffers on cache-line boundaries, on huge pages where they are large.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

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
    Pages(Pages),
}

/// A range of a chunk of huge pages that belongs to one buffer.
struct Pages {
    start: *mut f32,
    /// Keeps the memory; the other ranges of the chunk are other buffers'.
    _chunk: Arc<MmapMut>,
}

// SAFETY: the range is owned like the memory of a `Vec`; nobody else points into it.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

/// The chunk of huge pages that the next buffers are cut from, and how much of it is used.
static CHUNK: Mutex<Option<(Arc<MmapMut>, usize)>> = Mutex::new(None);

const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Maps zeros, on huge pages where the system has them.
fn map(bytes: usize) -> Option<MmapMut> {
    let pages = MmapOptions::new().len(bytes).map_anon().ok()?;
    // Advice only: without huge pages the buffer works all the same.
    #[cfg(target_os = "linux")]
    let _ = pages.advise(memmap2::Advice::HugePage);
    Some(pages)
}

impl Pages {
    /// `len` zeros that share their pages with nobody.
    fn own(len: usize) -> Option<Self> {
        let pages = map(len * size_of::<f32>())?;
        Some(Self {
            start: pages.as_ptr().cast::<f32>().cast_mut(),
            _chunk: Arc::new(pages),
        })
    }

    /// `len` zeros, or `None` if there is no memory to map.
    fn take(len: usize) -> Option<Self> {
        let bytes = round_up(len * size_of::<f32>(), align_of::<Line>());
        let mut current = CHUNK.lock().unwrap_or_else(PoisonError::into_inner);
        let room = current
            .as_ref()
            .map_or(0, |(chunk, used)| chunk.len() - used);
        if room < bytes {
            let size = round_up(bytes.max(4 * HUGE_PAGE_BYTES), HUGE_PAGE_BYTES);
            *current = Some((Arc::new(map(size)?), 0));
        }
        let (chunk, used) = current.as_mut()?;
        let start = chunk.as_ptr().wrapping_add(*used).cast::<f32>().cast_mut();
        *used += bytes;
        Some(Self {
            start,
            _chunk: Arc::clone(chunk),
        })
    }
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
    /// `len` zeros; on huge pages if they fill one, as walking activations column by column touches a
    /// page per row otherwise.
    pub(crate) fn zeros(len: usize) -> Self {
        let pages = (len * size_of::<f32>() >= HUGE_PAGE_BYTES).then(|| Pages::own(len));
        if let Some(Some(pages)) = pages {
            return Self {
                memory: Memory::Pages(pages),
                len,
            };
        }
        let lines = vec![Line([0.0; LINE]); len.div_ceil(LINE)];
        Self {
            memory: Memory::Lines(lines),
            len,
        }
    }

    /// `len` zeros on huge pages where the system has them; for weights, which are streamed.
    ///
    /// Small buffers share a page, and are freed with the last of its chunk.
    pub(crate) fn zeros_huge(len: usize) -> Self {
        match Pages::take(len) {
            Some(pages) => Self {
                memory: Memory::Pages(pages),
                len,
            },
            None => Self::zeros(len),
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
        if len == self.len {
            return;
        }
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
            Memory::Pages(pages) => pages.start.cast_const(),
        };
        // SAFETY: both kinds of memory hold at least `len` initialised floats, aligned to 64 bytes.
        unsafe { std::slice::from_raw_parts(start, self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        let start = match &mut self.memory {
            Memory::Lines(lines) => lines.as_mut_ptr().cast::<f32>(),
            Memory::Pages(pages) => pages.start,
        };
        // SAFETY: as in `deref`, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(start, self.len) }
    }
}
