//! Values and gradients of each loss beside numbers worked out apart, and what each refuses.

use super::*;

const L: [f32; 4] = [-0.5, -1.2, -2.0, -0.1];
const ADVANTAGES: [f32; 4] = [1.0, 1.0, -0.5, -1.0];

fn logprobs() -> Vec<f32> {
    vec![-0.7, -1.0, -2.0, -1.1]
}

fn check(loss: &Loss, value: f64, gradient: [f64; 4]) {
    let terms: Vec<(f64, f32)> = (0..4).map(|i| loss.term(i, L[i])).collect();
    let evaluated = loss.evaluate(&L).unwrap();
    assert!((evaluated.total - value).abs() < 1e-6, "{loss:?}");
    for ((i, (value, derivative)), expected) in terms.iter().enumerate().zip(gradient) {
        assert!((f64::from(*derivative) - expected).abs() < 1e-6, "{loss:?}");
        assert_eq!(evaluated.terms[i], *value as f32);
        assert_eq!(evaluated.gradient[i], *derivative);
    }
}

#[test]
#[expect(clippy::approx_constant, reason = "the digits of the golden vector")]
fn values_and_gradients_match_the_golden_vector() {
    let (logprobs, advantages) = (logprobs(), ADVANTAGES.to_vec());
    let weights = vec![0.0, 1.0, 1.0, 0.5];
    check(
        &Loss::CrossEntropy { weights },
        3.25,
        [0.0, -1.0, -1.0, -0.5],
    );
    let is = Loss::ImportanceSampling {
        logprobs: logprobs.clone(),
        advantages: advantages.clone(),
    };
    check(&is, 1.178_148_317, [-1.221_403, -0.818_731, 0.5, 2.718_282]);
    let ppo = Loss::Ppo {
        logprobs: logprobs.clone(),
        advantages: advantages.clone(),
        clip: Clip::between(0.8, 1.2),
    };
    check(&ppo, 1.199_551_075, [0.0, -0.818_731, 0.5, 2.718_282]);
    let steep = [-1.221_403, -0.818_731, 0.5, 2.718_282];
    for (clip, value, gradient) in [
        (Clip::between(0.0, 4.0), 0.321_350_1, steep),
        (
            Clip::between(0.8, 1.2),
            0.462_476_904,
            [-1.2, -0.818_731, 0.5, 1.2],
        ),
    ] {
        let (logprobs, advantages) = (logprobs.clone(), advantages.clone());
        let cispo = Loss::Cispo {
            logprobs,
            advantages,
            clip,
        };
        check(&cispo, value, gradient);
    }
    let dro = Loss::Dro {
        logprobs,
        advantages,
        beta: 0.05,
    };
    check(&dro, 0.627, [-0.99, -1.01, 0.5, 1.05]);
}

fn refusal(loss: Loss) -> String {
    let sequence = TrainSequence {
        tokens: vec![1; 4],
        targets: vec![1; 4],
        k: 1,
        loss,
    };
    sequence.check(10, 10).unwrap_err()
}

#[test]
fn refusals_name_the_input_and_the_position() {
    let gspo = |in_ratio: &[bool], clip| Loss::Gspo {
        logprobs: logprobs(),
        advantages: ADVANTAGES.to_vec(),
        in_ratio: in_ratio.to_vec(),
        clip,
    };
    let ppo = |advantages: &[f32], low, high| Loss::Ppo {
        logprobs: logprobs(),
        advantages: advantages.to_vec(),
        clip: Clip { low, high },
    };
    let all = Clip::between(0.9, 1.1);
    let (low, high) = (Bound::All(0.9), Bound::All(1.1));
    let cases = [
        (
            ppo(&[0.0, 0.0, f32::INFINITY, 0.0], low.clone(), high.clone()),
            "advantages is inf at position 2: it must be finite",
        ),
        (
            ppo(&ADVANTAGES[..3], low.clone(), high.clone()),
            "3 advantages for 4 targets",
        ),
        (
            ppo(&ADVANTAGES, Bound::Each(vec![0.9; 3]), high.clone()),
            "3 lower bounds for 4 targets",
        ),
        (
            ppo(&ADVANTAGES, Bound::Each(vec![0.9, 0.9, 0.9, 2.0]), high),
            "clip range 2 to 1.1 at position 3 is empty",
        ),
        (
            ppo(&ADVANTAGES, low, Bound::All(f32::NAN)),
            "clip range 0.9 to NaN is empty",
        ),
        (
            gspo(&[false; 4], all.clone()),
            "no target is in the sequence ratio: mark at least one",
        ),
        (
            gspo(&[true; 5], all),
            "5 marks of the sequence ratio for 4 targets",
        ),
        (
            Loss::Dro {
                logprobs: logprobs(),
                advantages: ADVANTAGES.to_vec(),
                beta: f32::NAN,
            },
            "beta is NaN, it must be at least 0",
        ),
    ];
    for (loss, expected) in cases {
        assert_eq!(refusal(loss), expected);
    }
}
