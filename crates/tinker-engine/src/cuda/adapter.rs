//! Adapters on the device, flat in the layout that they have on the host.

use std::sync::Arc;

use super::device::Device;
use super::memory::{Buffer, Floats};
use super::ops::Ops;
use crate::adapter::{ALPHA, AdapterState, LoraSpec};
use crate::arch::Arch;
use crate::cpu::lora::layout::{Layout, Place};
use crate::cpu::lora::{Adapter as Host, Group, Numbers};
use crate::cpu::pool::Pool;
use crate::error::Result;
use crate::optim::{AdamW, OptimReport, Optimizer, clip_factor};

/// An adapter: LoRA weights, gradient, optimizer moments.
#[derive(Debug)]
pub(super) struct Adapter {
    spec: LoraSpec,
    layout: Layout,
    /// `A [rank, in]` and `B^T [rank, out]` of every module.
    weights: Buffer,
    /// Accumulated gradient; absent when there is none.
    pub(super) gradient: Option<Buffer>,
    first_moment: Option<Buffer>,
    second_moment: Option<Buffer>,
    step: u64,
}

impl Adapter {
    /// A new adapter, with the numbers that it has on any device.
    pub(super) fn new(device: &Arc<dyn Device>, arch: &Arch, spec: &LoraSpec) -> Result<Self> {
        Self::of(device, &Host::new(arch, spec)?)
    }

    /// Reads a saved state; see [`crate::Backend::import_adapter`].
    pub(super) fn import(
        device: &Arc<dyn Device>,
        arch: &Arch,
        state: &AdapterState,
    ) -> Result<Self> {
        Self::of(device, &Host::import(arch, state)?)
    }

    fn of(device: &Arc<dyn Device>, host: &Host) -> Result<Self> {
        let numbers = host.numbers();
        let buffer = |values: &[f32]| -> Result<Option<Buffer>> {
            if values.is_empty() {
                return Ok(None);
            }
            Buffer::of(device, values).map(Some)
        };
        Ok(Self {
            spec: host.spec(),
            layout: host.layout().clone(),
            weights: Buffer::of(device, &numbers.weights)?,
            gradient: buffer(&numbers.gradient)?,
            first_moment: buffer(&numbers.first_moment)?,
            second_moment: buffer(&numbers.second_moment)?,
            step: numbers.step,
        })
    }

    /// The same adapter on the host.
    fn to_host(&self, arch: &Arch) -> Result<Host> {
        let values = |buffer: &Option<Buffer>| match buffer {
            Some(buffer) => buffer.to_host(),
            None => Ok(Vec::new()),
        };
        let numbers = Numbers {
            weights: self.weights.to_host()?,
            gradient: values(&self.gradient)?,
            first_moment: values(&self.first_moment)?,
            second_moment: values(&self.second_moment)?,
            step: self.step,
        };
        Host::of_numbers(arch, &self.spec, &numbers)
    }

    /// Copies everything to the host.
    pub(super) fn export(&self, arch: &Arch) -> Result<AdapterState> {
        Ok(self.to_host(arch)?.export())
    }

    /// A copy of the weights alone.
    pub(super) fn snapshot(&self) -> Result<Self> {
        Ok(Self {
            spec: self.spec,
            layout: self.layout.clone(),
            weights: self.weights.copied()?,
            gradient: None,
            first_moment: None,
            second_moment: None,
            step: 0,
        })
    }

    /// A copy of everything.
    pub(super) fn copied(&self) -> Result<Self> {
        let copy = |buffer: &Option<Buffer>| buffer.as_ref().map(Buffer::copied).transpose();
        Ok(Self {
            gradient: copy(&self.gradient)?,
            first_moment: copy(&self.first_moment)?,
            second_moment: copy(&self.second_moment)?,
            step: self.step,
            ..self.snapshot()?
        })
    }

    /// Bytes of memory on the device.
    pub(super) fn bytes(&self) -> usize {
        let rest = [&self.gradient, &self.first_moment, &self.second_moment];
        let rest = rest.into_iter().flatten().map(Buffer::bytes);
        self.weights.bytes() + rest.sum::<usize>()
    }

    /// Elements of a gradient.
    pub(super) fn gradient_len(&self) -> usize {
        self.layout.len
    }

    /// Widest padded rank, to size scratch with.
    pub(super) fn padded_rank(&self) -> usize {
        self.layout.rank
    }

    /// The error that says which tensor of a gradient is not finite, if one is.
    pub(super) fn check_gradient(&self, arch: &Arch, gradient: &Buffer) -> Result<()> {
        let host = Host::new(arch, &self.spec)?;
        host.check_gradient(&gradient.to_host()?)
    }

    /// The modules at a place of the model, if they are trained.
    pub(super) fn lora(&self, site: Site) -> Option<Lora<'_>> {
        let place = match site {
            Site::Block(layer, group) => self.layout.blocks[layer][group as usize].as_ref()?,
            Site::Head => self.layout.head.as_ref()?,
        };
        Some(Lora {
            rank: self.layout.rank,
            scale: ALPHA / self.spec.rank as f32,
            weights: self.weights.floats(),
            place,
        })
    }

    /// One step; see [`crate::Backend::optim_step`]. What goes wrong is found out on the host, where
    /// its error names the tensor, and Dimuon is computed there.
    pub(super) fn optim_step(
        &mut self,
        ops: &mut Ops,
        arch: &Arch,
        optimizer: &Optimizer,
    ) -> Result<OptimReport> {
        if let Optimizer::AdamW(params) = optimizer
            && optimizer.check().is_ok()
            && (self.step == 0 || self.second_moment.is_some())
            && let Some(report) = self.adamw(ops, params)?
        {
            return Ok(report);
        }
        let mut host = self.to_host(arch)?;
        let report = host.optim_step(optimizer, &Pool::new(0), &mut Vec::new())?;
        *self = Self::of(&ops.device, &host)?;
        Ok(report)
    }

    /// An AdamW step on the device, unless it would leave the range of floats.
    fn adamw(&mut self, ops: &mut Ops, params: &AdamW) -> Result<Option<OptimReport>> {
        let (device, len) = (Arc::clone(&ops.device), self.layout.len);
        // What is not held begins as zeros, which become the adapter's own once the step is taken.
        let held_or_zeros = |held: Option<&Buffer>| -> Result<(Option<Buffer>, Floats)> {
            if let Some(held) = held {
                return Ok((None, held.floats()));
            }
            let zeros = Buffer::zeros(&device, len)?;
            let floats = zeros.floats();
            Ok((Some(zeros), floats))
        };
        let continues = self.step > 0;
        let (_zeros, gradient) = held_or_zeros(self.gradient.as_ref())?;
        let first = self.first_moment.as_ref().filter(|_| continues);
        let (new_first, first) = held_or_zeros(first)?;
        let second = self.second_moment.as_ref().filter(|_| continues);
        let (new_second, second) = held_or_zeros(second)?;
        let grad_norm = ops.sum_of_squares(len, gradient)?.sqrt();
        let clip = clip_factor(params.grad_clip_norm, grad_norm);
        let numbers = [self.weights.floats(), gradient, first, second];
        if !ops.adamw(params, (clip, self.step + 1), numbers)? {
            return Ok(None);
        }
        if new_first.is_some() {
            self.first_moment = new_first;
        }
        if new_second.is_some() {
            self.second_moment = new_second;
        }
        self.gradient = None;
        self.step += 1;
        Ok(Some(OptimReport {
            step: self.step,
            grad_norm,
        }))
    }
}

/// Which layers of the model, to find their modules.
#[derive(Debug, Clone, Copy)]
pub(super) enum Site {
    Block(usize, Group),
    Head,
}

/// The modules of one group: layer `i` adds `scale * B_i A_i x`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lora<'a> {
    /// Padded rank of each module.
    pub(super) rank: usize,
    pub(super) scale: f32,
    weights: Floats,
    place: &'a Place,
}

/// A layer's `B^T [rank, out]` in a flat buffer.
#[derive(Debug, Clone, Copy)]
pub(super) struct SecondFactor {
    pub(super) floats: Floats,
    /// Distance of rows.
    pub(super) stride: usize,
    pub(super) out: usize,
}

impl Lora<'_> {
    /// Rank of all modules together: the width of `A x`.
    pub(super) fn width(&self) -> usize {
        self.place.modules.len() * self.rank
    }

    /// Width of the input.
    pub(super) fn inner(&self) -> usize {
        self.place.inner
    }

    /// Where layer `i` starts in a row of `A x`.
    pub(super) fn column(&self, i: usize) -> usize {
        self.place.layers[i].module * self.rank
    }

    /// Whether layer `i` shares its `A` with the layer before it.
    pub(super) fn joins(&self, i: usize) -> bool {
        self.place.layers[i].start > 0
    }

    /// `A [modules * rank, in]` in the weights or in a gradient.
    pub(super) fn a_of(&self, flat: Floats) -> Floats {
        flat.range(self.place.a, self.width() * self.place.inner)
    }

    /// `A` itself.
    pub(super) fn a(&self) -> Floats {
        self.a_of(self.weights)
    }

    /// `B^T` of layer `i` in the weights or in a gradient.
    pub(super) fn b_of(&self, i: usize, flat: Floats) -> SecondFactor {
        let layer = self.place.layers[i];
        let module = &self.place.modules[layer.module];
        let len = (self.rank - 1) * module.out + layer.out;
        SecondFactor {
            floats: flat.range(module.b + layer.start, len),
            stride: module.out,
            out: layer.out,
        }
    }

    /// `B^T` of layer `i` itself.
    pub(super) fn b(&self, i: usize) -> SecondFactor {
        self.b_of(i, self.weights)
    }
}
