//! Instruction sets: which one the machine has, and one kernel body compiled for each.
//!
//! Kernels keep 16 partial sums in every instruction set, so the order of a reduction is a property
//! of the kernel, not of the machine.

use std::sync::OnceLock;

static BEST: OnceLock<Isa> = OnceLock::new();

/// An instruction set that kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Isa {
    /// 512-bit vectors with fused multiply-add (x86-64-v4).
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// 256-bit vectors with fused multiply-add (x86-64-v3).
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// 128-bit vectors with fused multiply-add, which every 64-bit ARM has.
    #[cfg(target_arch = "aarch64")]
    Neon,
    /// What the compiler assumes of every machine of this architecture.
    Baseline,
}

impl Isa {
    /// The best instruction set of this machine.
    pub(crate) fn best() -> Self {
        *BEST.get_or_init(|| Self::available()[0])
    }

    /// Makes 256-bit vectors the best that this process uses, unless it has used others already or
    /// the machine has none.
    pub(crate) fn limit_to_avx2() -> bool {
        #[cfg(target_arch = "x86_64")]
        if Self::available().contains(&Self::Avx2) {
            return *BEST.get_or_init(|| Self::Avx2) == Self::Avx2;
        }
        false
    }

    /// The instruction sets of this machine, best first.
    pub(crate) fn available() -> Vec<Self> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq");
            if avx2 && avx512 {
                found.push(Self::Avx512);
            }
            if avx2 {
                found.push(Self::Avx2);
            }
        }
        #[cfg(target_arch = "aarch64")]
        found.push(Self::Neon);
        found.push(Self::Baseline);
        found
    }

    /// Lower-case name, as in a run's record.
    pub(crate) fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            #[cfg(target_arch = "aarch64")]
            Self::Neon => "neon",
            Self::Baseline => "baseline",
        }
    }
}

/// Whether the baseline has a fused multiply-add; where not, `f32::mul_add` is a slow library call.
pub(crate) const BASELINE_FMA: bool = cfg!(any(target_arch = "aarch64", target_feature = "fma"));

/// `a * b + c`, fused where `FMA`.
#[inline(always)]
pub(crate) fn madd<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// Compiles each kernel body once per instruction set and picks one at run time.
///
/// The body sees a constant `FMA`. Beside `name(..)` there is `name_at(isa, ..)` for tests.
macro_rules! kernels {
    ($($(#[$meta:meta])* fn $name:ident / $at:ident ($($arg:ident : $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block)*) => { $(
        $(#[$meta])*
        pub(crate) fn $name($($arg: $ty),*) $(-> $ret)? {
            $at(crate::cpu::simd::Isa::best(), $($arg),*)
        }

        fn $at(isa: crate::cpu::simd::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body<const FMA: bool>($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
            fn avx512($($arg: $ty),*) $(-> $ret)? { body::<true>($($arg),*) }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $ty),*) $(-> $ret)? { body::<true>($($arg),*) }

            match isa {
                // SAFETY: an `Isa` is only made for a machine that has it.
                #[cfg(target_arch = "x86_64")]
                crate::cpu::simd::Isa::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                crate::cpu::simd::Isa::Avx2 => unsafe { avx2($($arg),*) },
                // The compiler's baseline of this architecture has NEON and makes use of it.
                #[cfg(target_arch = "aarch64")]
                crate::cpu::simd::Isa::Neon => body::<true>($($arg),*),
                crate::cpu::simd::Isa::Baseline => {
                    body::<{ crate::cpu::simd::BASELINE_FMA }>($($arg),*)
                }
            }
        }
    )* };
}
pub(crate) use kernels;
