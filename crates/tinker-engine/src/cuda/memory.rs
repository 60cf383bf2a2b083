//! Memory on the device: owned allocations, and ranges of them that kernels read and write.

use std::sync::Arc;

use super::device::{Device, fault};
use crate::error::Result;

/// An allocation, given back when it is dropped.
#[derive(Debug)]
pub(super) struct Memory {
    device: Arc<dyn Device>,
    address: u64,
    bytes: usize,
}

impl Memory {
    pub(super) fn take(device: &Arc<dyn Device>, bytes: usize) -> Result<Self> {
        Ok(Self {
            device: Arc::clone(device),
            address: device.allocate(bytes.max(1))?,
            bytes,
        })
    }

    pub(super) fn address(&self) -> u64 {
        self.address
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Overwrites the bytes from `start` on.
    pub(super) fn upload(&mut self, start: usize, bytes: &[u8]) -> Result<()> {
        self.check(start, bytes.len())?;
        // SAFETY: the range is inside the allocation.
        unsafe { self.device.upload(self.address + start as u64, bytes) }
    }

    fn check(&self, start: usize, len: usize) -> Result<()> {
        if start.checked_add(len).is_none_or(|end| end > self.bytes) {
            let bytes = self.bytes;
            return Err(fault(format!(
                "bytes {start} to {start} + {len} are not in an allocation of {bytes}"
            )));
        }
        Ok(())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: it was taken when this was made, and whatever reads it is before this in the device's
        // order of calls.
        unsafe { self.device.release(self.address, self.bytes.max(1)) };
    }
}

/// Floats on the device, which grow as needed.
#[derive(Debug)]
pub(super) struct Buffer {
    device: Arc<dyn Device>,
    memory: Option<Memory>,
    len: usize,
}

impl Buffer {
    pub(super) fn empty(device: &Arc<dyn Device>) -> Self {
        Self {
            device: Arc::clone(device),
            memory: None,
            len: 0,
        }
    }

    /// `len` floats that are not yet defined.
    pub(super) fn with_len(device: &Arc<dyn Device>, len: usize) -> Result<Self> {
        let mut buffer = Self::empty(device);
        buffer.reserve(len)?;
        Ok(buffer)
    }

    pub(super) fn zeros(device: &Arc<dyn Device>, len: usize) -> Result<Self> {
        let buffer = Self::with_len(device, len)?;
        buffer.clear()?;
        Ok(buffer)
    }

    pub(super) fn of(device: &Arc<dyn Device>, values: &[f32]) -> Result<Self> {
        let mut buffer = Self::with_len(device, values.len())?;
        buffer.set(values)?;
        Ok(buffer)
    }

    /// Another buffer with the same floats.
    pub(super) fn copied(&self) -> Result<Self> {
        let copy = Self::with_len(&self.device, self.len)?;
        copy.floats().copy_from(&self.device, self.floats())?;
        Ok(copy)
    }

    /// Makes room for `len` floats; what it held is lost if it grows.
    pub(super) fn reserve(&mut self, len: usize) -> Result<()> {
        if len > self.len {
            self.memory = None;
            self.len = 0;
            self.memory = Some(Memory::take(&self.device, len * size_of::<f32>())?);
            self.len = len;
        }
        Ok(())
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn bytes(&self) -> usize {
        self.memory.as_ref().map_or(0, Memory::bytes)
    }

    /// All of it.
    pub(super) fn floats(&self) -> Floats {
        Floats {
            address: self.memory.as_ref().map_or(0, Memory::address),
            len: self.len,
        }
    }

    pub(super) fn clear(&self) -> Result<()> {
        self.floats().clear(&self.device)
    }

    /// Overwrites the first floats.
    pub(super) fn set(&mut self, values: &[f32]) -> Result<()> {
        match &mut self.memory {
            Some(memory) => memory.upload(0, as_bytes(values)),
            None => Ok(()),
        }
    }

    /// Copies it to the host.
    pub(super) fn to_host(&self) -> Result<Vec<f32>> {
        self.floats().to_host(&self.device)
    }
}

/// Numbers that go to the device as they lie in memory.
pub(super) trait Plain: Copy {}
impl Plain for u8 {}
impl Plain for f32 {}
impl Plain for f64 {}
impl Plain for u16 {}
impl Plain for u32 {}
impl Plain for u64 {}

pub(super) fn as_bytes<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: these numbers have no padding, and any byte may be read.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

fn as_bytes_mut<T: Plain>(values: &mut [T]) -> &mut [u8] {
    // SAFETY: as above, and any bytes are such numbers.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}

/// Words and numbers that a call uploads for its kernels.
#[derive(Debug)]
pub(super) struct Table {
    device: Arc<dyn Device>,
    memory: Option<Memory>,
}

impl Table {
    pub(super) fn empty(device: &Arc<dyn Device>) -> Self {
        Self {
            device: Arc::clone(device),
            memory: None,
        }
    }

    /// Replaces what it holds; returns where it lies.
    pub(super) fn set<T: Plain>(&mut self, values: &[T]) -> Result<u64> {
        let bytes = as_bytes(values);
        self.room(bytes.len())?;
        match &mut self.memory {
            Some(memory) => {
                memory.upload(0, bytes)?;
                Ok(memory.address())
            }
            None => Ok(0),
        }
    }

    /// Where it lies.
    pub(super) fn address(&self) -> u64 {
        self.memory.as_ref().map_or(0, Memory::address)
    }

    /// `len` of the floats it holds, from byte `start` on.
    pub(super) fn floats(&self, start: usize, len: usize) -> Result<Floats> {
        if let Some(memory) = &self.memory {
            memory.check(start, len * size_of::<f32>())?;
        }
        let address = self.address() + start as u64;
        Ok(Floats { address, len })
    }

    /// Makes room for so many bytes; returns where they lie. What it held may be lost.
    pub(super) fn room(&mut self, bytes: usize) -> Result<u64> {
        if self.memory.as_ref().is_none_or(|m| m.bytes() < bytes) {
            self.memory = None;
            let size = bytes.next_multiple_of(256);
            self.memory = Some(Memory::take(&self.device, size)?);
        }
        Ok(self.address())
    }

    /// As [`Table::room`], for `n` numbers.
    pub(super) fn reserve<T: Plain>(&mut self, n: usize) -> Result<u64> {
        self.room(n * size_of::<T>())
    }

    /// Copies the first `n` numbers to the host.
    pub(super) fn to_host<T: Plain + Default>(&self, n: usize) -> Result<Vec<T>> {
        let mut values = vec![T::default(); n];
        if let Some(memory) = &self.memory {
            let bytes = as_bytes_mut(&mut values);
            memory.check(0, bytes.len())?;
            // SAFETY: the range is inside the allocation.
            unsafe { self.device.download(memory.address, bytes)? };
        }
        Ok(values)
    }
}

/// A range of floats on the device; whoever makes one sees to it that the memory outlives the calls
/// that it is passed to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Floats {
    address: u64,
    len: usize,
}

impl Floats {
    pub(super) fn address(self) -> u64 {
        self.address
    }

    pub(super) fn len(self) -> usize {
        self.len
    }

    /// From float `start` on.
    pub(super) fn from(self, start: usize) -> Self {
        debug_assert!(start <= self.len, "{start} {}", self.len);
        Self {
            address: self.address + (start * size_of::<f32>()) as u64,
            len: self.len.saturating_sub(start),
        }
    }

    /// `len` floats from `start` on.
    pub(super) fn range(self, start: usize, len: usize) -> Self {
        let rest = self.from(start);
        debug_assert!(len <= rest.len, "{len} {}", rest.len);
        Self {
            len: len.min(rest.len),
            ..rest
        }
    }

    /// Room for what is carved of it, piece by piece.
    pub(super) fn carve(self) -> Carver {
        Carver {
            floats: self,
            taken: 0,
        }
    }

    pub(super) fn clear(self, device: &Arc<dyn Device>) -> Result<()> {
        if self.len == 0 {
            return Ok(());
        }
        // SAFETY: the range is inside an allocation.
        unsafe { device.clear(self.address, self.len * size_of::<f32>()) }
    }

    /// Overwrites it with floats of another range, as many as both have.
    pub(super) fn copy_from(self, device: &Arc<dyn Device>, from: Self) -> Result<()> {
        let bytes = self.len.min(from.len) * size_of::<f32>();
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: both ranges are inside allocations.
        unsafe { device.copy(from.address, self.address, bytes) }
    }

    pub(super) fn to_host(self, device: &Arc<dyn Device>) -> Result<Vec<f32>> {
        let mut values = vec![0.0f32; self.len];
        if self.len > 0 {
            // SAFETY: the range is inside an allocation.
            unsafe { device.download(self.address, as_bytes_mut(&mut values))? };
        }
        Ok(values)
    }
}

/// Floats that pieces of begin where allocations would: so products of them have the same bits.
const PIECE: usize = 64;

/// Hands out ranges of floats, one after the other.
#[derive(Debug)]
pub(super) struct Carver {
    floats: Floats,
    /// Of `floats`, or more where they do not suffice.
    taken: usize,
}

impl Carver {
    /// One that only counts; what it hands out is not to be touched.
    pub(super) fn counting() -> Self {
        let (address, len) = (0, usize::MAX / size_of::<f32>());
        Floats { address, len }.carve()
    }

    /// The next `len` floats.
    pub(super) fn take(&mut self, len: usize) -> Floats {
        let start = self.taken;
        self.taken = start.saturating_add(len).next_multiple_of(PIECE);
        self.floats.range(start, len)
    }

    /// How many it has handed out, with those between pieces.
    pub(super) fn taken(&self) -> usize {
        self.taken
    }
}
