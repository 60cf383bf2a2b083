//! The numbers of an adapter, as they go to another device and come back.

use super::layout::Layout;
use super::{Adapter, Buffer};
use crate::adapter::LoraSpec;
use crate::arch::Arch;
use crate::error::Result;

/// Everything an adapter holds, flat in its layout; empty where there is none.
#[derive(Debug, Clone, Default)]
pub(crate) struct Numbers {
    pub(crate) weights: Vec<f32>,
    pub(crate) gradient: Vec<f32>,
    pub(crate) first_moment: Vec<f32>,
    pub(crate) second_moment: Vec<f32>,
    pub(crate) step: u64,
}

impl Adapter {
    /// The adapter that has these numbers.
    pub(crate) fn of_numbers(arch: &Arch, spec: &LoraSpec, numbers: &Numbers) -> Result<Self> {
        let mut adapter = Self::zeros(arch, spec)?;
        adapter.weights.copy_from_slice(&numbers.weights);
        adapter.gradient = Buffer::from_slice(&numbers.gradient);
        adapter.first_moment = Buffer::from_slice(&numbers.first_moment);
        adapter.second_moment = Buffer::from_slice(&numbers.second_moment);
        adapter.step = numbers.step;
        adapter.turn();
        Ok(adapter)
    }

    /// A copy of its numbers.
    pub(crate) fn numbers(&self) -> Numbers {
        Numbers {
            weights: self.weights.to_vec(),
            gradient: self.gradient.to_vec(),
            first_moment: self.first_moment.to_vec(),
            second_moment: self.second_moment.to_vec(),
            step: self.step,
        }
    }

    /// Where its factors lie.
    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// How it was created.
    pub(crate) fn spec(&self) -> LoraSpec {
        self.spec
    }
}
