//! The operations that are answered by futures, as the `X-Tinker-Request-Type` header names them.

use std::fmt;

/// What a future will bring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the names are the wire's own")]
pub enum RequestType {
    CreateModel,
    LoadWeights,
    ForwardBackward,
    Forward,
    OptimStep,
    SaveWeights,
    SaveWeightsForSampler,
    SaveWeightsExternal,
    Sample,
    CreateCustomLoss,
    UnloadModel,
}

impl RequestType {
    /// The header's value.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::CreateModel => "CreateModel",
            Self::LoadWeights => "LoadWeights",
            Self::ForwardBackward => "ForwardBackward",
            Self::Forward => "Forward",
            Self::OptimStep => "OptimStep",
            Self::SaveWeights => "SaveWeights",
            Self::SaveWeightsForSampler => "SaveWeightsForSampler",
            Self::SaveWeightsExternal => "SaveWeightsExternal",
            Self::Sample => "Sample",
            Self::CreateCustomLoss => "CreateCustomLoss",
            Self::UnloadModel => "UnloadModel",
        }
    }
}

impl fmt::Display for RequestType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
