//! AdamW with decoupled weight decay and clipping by global norm.

/// Hyper-parameters of one AdamW step (Loshchilov and Hutter 2019, algorithm 2).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Step size, at least 0.
    pub learning_rate: f32,
    /// Decay of the first moment, in `[0, 1)`.
    pub beta1: f32,
    /// Decay of the second moment, in `[0, 1)`.
    pub beta2: f32,
    /// Added to the root of the second moment, above 0.
    pub eps: f32,
    /// Decoupled: the weight shrinks by `learning_rate * weight_decay` of itself.
    pub weight_decay: f32,
    /// Largest global gradient norm; 0 turns clipping off.
    pub grad_clip_norm: f32,
}

/// What a step did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OptimReport {
    /// Steps taken so far, this one included.
    pub step: u64,
    /// Global L2 norm of the gradient before clipping.
    pub grad_norm: f64,
}
