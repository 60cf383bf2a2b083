//! Weights on disk: one or several memory-mapped safetensors files, read tensor by tensor.
//!
//! Nothing is copied but what the caller packs, so a model needs its packed size in memory and no
//! more. Every tensor is checked for presence, shape, type and finite values as it is read.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use crate::error::{Error, Result};

/// The tensors of a model directory.
#[derive(Debug)]
pub struct Weights {
    dir: PathBuf,
    files: Vec<(PathBuf, Mmap)>,
    index: BTreeMap<String, Entry>,
}

#[derive(Debug, Clone)]
struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    start: usize,
    end: usize,
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

impl Weights {
    /// Maps `model.safetensors`, or the shards that `model.safetensors.index.json` lists.
    ///
    /// # Errors
    /// If there is neither, or a file is not valid safetensors.
    pub fn open(dir: &Path) -> Result<Self> {
        let single = dir.join("model.safetensors");
        let paths = if single.exists() {
            vec![single]
        } else {
            shards(dir)?
        };
        let mut weights = Self {
            dir: dir.to_path_buf(),
            files: Vec::new(),
            index: BTreeMap::new(),
        };
        for path in paths {
            weights.add_file(path)?;
        }
        Ok(weights)
    }

    /// Maps one safetensors file.
    ///
    /// # Errors
    /// If it cannot be read or is not valid.
    pub fn open_file(path: &Path) -> Result<Self> {
        let mut weights = Self {
            dir: path.to_path_buf(),
            files: Vec::new(),
            index: BTreeMap::new(),
        };
        weights.add_file(path.to_path_buf())?;
        Ok(weights)
    }

    /// Names and shapes of all tensors, in the order of names.
    pub fn shapes(&self) -> impl Iterator<Item = (&str, &[usize])> {
        let entries = self.index.iter();
        entries.map(|(name, entry)| (name.as_str(), &entry.shape[..]))
    }

    /// Names and shapes of all tensors, and whether they hold bf16 numbers.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = (&str, &[usize], bool)> {
        let entries = self.index.iter();
        entries.map(|(name, entry)| (name.as_str(), &entry.shape[..], entry.dtype == Dtype::BF16))
    }

    fn add_file(&mut self, path: PathBuf) -> Result<()> {
        let refuse = |message: String| Error::Model {
            path: path.clone(),
            message,
        };
        let file = File::open(&path).map_err(|e| refuse(e.to_string()))?;
        #[expect(unsafe_code, reason = "mapping a file")]
        // SAFETY: the file must not change while it is mapped; model files are written once, and
        // the map is dropped when loading ends.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| refuse(e.to_string()))?;
        let (header_bytes, metadata) = SafeTensors::read_metadata(&map)
            .map_err(|e| refuse(format!("not a valid safetensors file ({e})")))?;
        let data_start = header_bytes + size_of::<u64>();
        for (name, info) in metadata.tensors() {
            let (start, end) = info.data_offsets;
            let entry = Entry {
                file: self.files.len(),
                dtype: info.dtype,
                shape: info.shape.clone(),
                start: data_start + start,
                end: data_start + end,
            };
            if entry.end > map.len() {
                return Err(refuse(format!("tensor `{name}` ends beyond the file")));
            }
            self.index.insert(name, entry);
        }
        self.files.push((path, map));
        Ok(())
    }

    /// Bytes that all tensors take on a device without numbers of 16 bits other than bf16.
    #[cfg(feature = "cuda")]
    pub(crate) fn bytes_on_device(&self) -> usize {
        let bytes = |entry: &Entry| match entry.dtype {
            Dtype::F16 => 2 * (entry.end - entry.start),
            _ => entry.end - entry.start,
        };
        self.index.values().map(bytes).sum()
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.index.contains_key(name)
    }

    /// The tensor `name`, which must have `shape`.
    ///
    /// # Errors
    /// If it is missing, has another shape or is not of a floating-point type of 16 or 32 bits.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor<'_>> {
        let entry = self.index.get(name).ok_or_else(|| Error::Model {
            path: self.dir.clone(),
            message: format!("tensor `{name}` is missing"),
        })?;
        let (path, map) = &self.files[entry.file];
        let refuse = |message: String| Error::Model {
            path: path.clone(),
            message,
        };
        if entry.shape != shape {
            let found = &entry.shape;
            return Err(refuse(format!(
                "tensor `{name}` has shape {found:?}, config.json asks for {shape:?}"
            )));
        }
        let width = match entry.dtype {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::BF16 => 2,
            other => {
                return Err(refuse(format!(
                    "tensor `{name}` is {other:?}; supported: F32, F16, BF16"
                )));
            }
        };
        let n: usize = shape.iter().product();
        let bytes = &map[entry.start..entry.end];
        if bytes.len() != n * width {
            return Err(refuse(format!(
                "tensor `{name}` has {} bytes for {n} values",
                bytes.len()
            )));
        }
        Ok(Tensor {
            name: name.to_owned(),
            path,
            dtype: entry.dtype,
            bytes,
        })
    }

    /// Reads a whole small tensor, such as a norm's weight.
    ///
    /// # Errors
    /// As [`Weights::tensor`], and if a value is not finite.
    pub fn vector(&self, name: &str, n: usize) -> Result<Vec<f32>> {
        let mut values = vec![0.0; n];
        self.tensor(name, &[n])?.read(0, &mut values)?;
        Ok(values)
    }
}

fn shards(dir: &Path) -> Result<Vec<PathBuf>> {
    let path = dir.join("model.safetensors.index.json");
    let refuse = |message: String| Error::Model {
        path: path.clone(),
        message,
    };
    if !path.exists() {
        let message = "has neither model.safetensors nor model.safetensors.index.json".to_owned();
        return Err(Error::Model {
            path: dir.to_path_buf(),
            message,
        });
    }
    let text = std::fs::read_to_string(&path).map_err(|e| refuse(e.to_string()))?;
    let index: ShardIndex = serde_json::from_str(&text).map_err(|e| refuse(e.to_string()))?;
    let mut names: Vec<String> = index.weight_map.into_values().collect();
    names.sort();
    names.dedup();
    if let Some(name) = names
        .iter()
        .find(|name| Path::new(name).file_name() != Some(name.as_ref()))
    {
        return Err(refuse(format!("shard `{name}` is not a plain file name")));
    }
    Ok(names.into_iter().map(|name| dir.join(name)).collect())
}

/// One tensor in a mapped file.
#[derive(Debug)]
pub struct Tensor<'a> {
    name: String,
    path: &'a Path,
    dtype: Dtype,
    bytes: &'a [u8],
}

impl Tensor<'_> {
    /// Reads `out.len()` values from the flat index `start` on, as `f32`.
    ///
    /// # Errors
    /// If a value is not finite.
    pub fn read(&self, start: usize, out: &mut [f32]) -> Result<()> {
        match self.dtype {
            Dtype::F32 => self.convert(start, out, f32::from_le_bytes),
            Dtype::F16 => self.convert(start, out, |b| f16::from_le_bytes(b).to_f32()),
            _ => self.convert(start, out, |b| bf16::from_le_bytes(b).to_f32()),
        }
        match out.iter().position(|x| !x.is_finite()) {
            None => Ok(()),
            Some(i) => Err(Error::Model {
                path: self.path.to_path_buf(),
                message: format!(
                    "tensor `{}` holds {} at index {}",
                    self.name,
                    out[i],
                    start + i
                ),
            }),
        }
    }

    /// Whether the file holds bf16 numbers.
    pub(crate) fn is_bf16(&self) -> bool {
        self.dtype == Dtype::BF16
    }

    fn convert<const N: usize>(
        &self,
        start: usize,
        out: &mut [f32],
        value: impl Fn([u8; N]) -> f32,
    ) {
        let (values, _) = self.bytes.as_chunks::<N>();
        for (out, bytes) in out.iter_mut().zip(&values[start..]) {
            *out = value(*bytes);
        }
    }
}
