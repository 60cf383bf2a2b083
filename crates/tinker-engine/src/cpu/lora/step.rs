//! Optimizer steps of an adapter, in chunks or factors that the pool's threads share.

use std::sync::atomic::{AtomicBool, Ordering};

use super::super::buffer::Buffer;
use super::super::elementwise::{self, AdamStep};
use super::super::pool::{Pool, SharedMut};
use super::Adapter;
use crate::error::{Error, Result};
use crate::optim::{AdamW, Dimuon, Direction, Family, OptimReport, Optimizer, clip_factor, ema};

/// Elements that one task of an optimizer step handles.
const CHUNK: usize = 1 << 14;

impl Adapter {
    /// One step; see [`crate::Backend::optim_step`]. What held the gradient goes to `spare`.
    pub(crate) fn optim_step(
        &mut self,
        optimizer: &Optimizer,
        pool: &Pool,
        spare: &mut Vec<Buffer>,
    ) -> Result<OptimReport> {
        optimizer.check()?;
        self.check_family(optimizer.family())?;
        let grad_norm = norm(&self.gradient, pool);
        match optimizer {
            Optimizer::AdamW(params) => self.adamw(params, grad_norm, pool)?,
            Optimizer::Dimuon(params) => self.dimuon(params, grad_norm, pool)?,
        }
        spare.push(std::mem::replace(&mut self.gradient, Buffer::zeros(0)));
        self.step += 1;
        self.turn();
        Ok(OptimReport {
            step: self.step,
            grad_norm,
        })
    }

    /// Forgets the accumulated gradient.
    pub(crate) fn clear_gradient(&mut self) {
        self.gradient = Buffer::zeros(0);
    }

    /// Moments of one optimizer mean nothing to the other.
    fn check_family(&self, wanted: Family) -> Result<()> {
        let own = match (self.step, self.second_moment.is_empty()) {
            (0, _) => return Ok(()),
            (_, true) => Family::Dimuon,
            (_, false) => Family::AdamW,
        };
        if own == wanted {
            return Ok(());
        }
        Err(Error::Invalid(format!(
            "the adapter was trained with {}, a step of {} cannot follow: load its weights without optimizer",
            own.name(),
            wanted.name()
        )))
    }

    fn adamw(&mut self, params: &AdamW, grad_norm: f64, pool: &Pool) -> Result<()> {
        let is_complete = self.step > 0 && !self.gradient.is_empty();
        let zeros = Buffer::zeros(if is_complete { 0 } else { self.layout.len });
        let gradient = if self.gradient.is_empty() {
            &zeros
        } else {
            &self.gradient
        };
        let next = self.step + 1;
        let step = AdamStep {
            params: *params,
            clip: clip_factor(params.grad_clip_norm, grad_norm),
            correction1: params.correction(params.beta1, next) as f32,
            correction2_root: params.correction(params.beta2, next).sqrt() as f32,
        };
        let (first, second) = if self.step == 0 {
            (&zeros, &zeros)
        } else {
            (&self.first_moment, &self.second_moment)
        };
        self.check_update(step, [gradient, first, second], pool)?;
        if self.step == 0 {
            self.first_moment = zeros.clone();
            self.second_moment = zeros.clone();
        }
        if self.gradient.is_empty() {
            self.gradient = zeros;
        }
        self.update(step, pool);
        Ok(())
    }

    /// One Dimuon step: the momentum everywhere, then factor by factor its direction.
    fn dimuon(&mut self, params: &Dimuon, grad_norm: f64, pool: &Pool) -> Result<()> {
        let len = self.layout.len;
        let mut momentum = Buffer::zeros(len);
        let clip = clip_factor(params.grad_clip_norm, grad_norm);
        let at = |values: &[f32], i: usize| if values.is_empty() { 0.0 } else { values[i] };
        for (i, m) in momentum.iter_mut().enumerate() {
            let gradient = clip * at(&self.gradient, i);
            *m = ema(params.beta1, at(&self.first_moment, i), gradient);
        }
        let mut weights = self.weights.clone();
        let rank = self.spec.rank;
        let places: Vec<_> = self.layout.tensors(rank).collect();
        let rate = params.rate(rank);
        let shared = SharedMut::new(&mut weights);
        let bad = AtomicBool::new(false);
        pool.run(places.len(), &|i| {
            let place = &places[i];
            let n = place.shape[0] * place.shape[1];
            let mut direction = momentum[place.start..][..n].to_vec();
            Direction::default().compute(rank, params.damping, &mut direction);
            // SAFETY: factors do not overlap and lie inside the buffer, which outlives the call.
            let weights = unsafe { shared.slice(place.start, n) };
            for (w, d) in weights.iter_mut().zip(&direction) {
                *w -= rate * d;
            }
            if !weights.iter().all(|w| w.is_finite()) {
                bad.store(true, Ordering::Relaxed);
            }
        });
        if bad.into_inner() {
            let finite = |i: usize| weights[i].is_finite();
            return Err(self.overflow(finite));
        }
        (self.weights, self.first_moment) = (weights, momentum);
        Ok(())
    }

    /// Checks that a step with this gradient and these moments leaves every value finite.
    fn check_update<'a>(
        &self,
        step: AdamStep,
        [gradient, first, second]: [&'a [f32]; 3],
        pool: &Pool,
    ) -> Result<()> {
        let len = self.layout.len;
        let finite = |w: &[f32], at: usize| {
            let of = |x: &'a [f32]| &x[at..at + w.len()];
            elementwise::adamw_stays_finite(step, w, of(gradient), of(first), of(second))
        };
        let overflowed = AtomicBool::new(false);
        pool.run(len.div_ceil(CHUNK), &|i| {
            let start = i * CHUNK;
            if !finite(&self.weights[start..len.min(start + CHUNK)], start) {
                overflowed.store(true, Ordering::Relaxed);
            }
        });
        if overflowed.into_inner() {
            return Err(self.overflow(|i| finite(&self.weights[i..=i], i)));
        }
        Ok(())
    }

    /// The error for a step after which not all of `finite` holds, naming the first tensor.
    fn overflow(&self, finite: impl Fn(usize) -> bool) -> Error {
        let mut tensors = self.layout.tensors(self.spec.rank);
        let bad = tensors.find(|t| t.indices().any(|i| !finite(i)));
        let name = bad.map_or("the adapter".to_owned(), |t| format!("`{}`", t.name));
        Error::NotFinite(format!(
            "the optimizer step takes weights or moments of {name} out of the range of f32: \
             lower the learning rate or clip the gradient"
        ))
    }

    /// Takes a step that is known to stay finite.
    fn update(&mut self, step: AdamStep, pool: &Pool) {
        let len = self.layout.len;
        let (weights, first, second) = (
            SharedMut::new(&mut self.weights),
            SharedMut::new(&mut self.first_moment),
            SharedMut::new(&mut self.second_moment),
        );
        let gradient = &self.gradient;
        pool.run(len.div_ceil(CHUNK), &|i| {
            let start = i * CHUNK;
            let n = CHUNK.min(len - start);
            // SAFETY: chunks do not overlap and lie inside the buffers, which outlive the call.
            let (w, m, v) = unsafe {
                (
                    weights.slice(start, n),
                    first.slice(start, n),
                    second.slice(start, n),
                )
            };
            elementwise::adamw(step, w, &gradient[start..][..n], m, v);
        });
    }
}

/// Global L2 norm; chunks are added in order, whoever computed them.
fn norm(gradient: &[f32], pool: &Pool) -> f64 {
    let mut sums = vec![0.0f64; gradient.len().div_ceil(CHUNK)];
    let shared = SharedMut::new(&mut sums);
    pool.run(gradient.len().div_ceil(CHUNK), &|i| {
        let chunk = &gradient[i * CHUNK..gradient.len().min((i + 1) * CHUNK)];
        // SAFETY: each task writes its own element.
        unsafe { shared.slice(i, 1)[0] = elementwise::sum_of_squares(chunk) };
    });
    sums.iter().sum::<f64>().sqrt()
}
