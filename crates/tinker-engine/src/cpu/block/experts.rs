//! A mixture of experts in place of the MLP: a router picks a few experts for each row, and their
//! outputs are added, weighted by its probabilities (Shazeer et al. 2017, section 2).
//!
//! Rows are gathered by expert, so that each expert is one product for all of its rows. An output is
//! the sum over experts in the order of their numbers, whoever else goes to them, so a row has the
//! same bits in every company.

use std::ops::Range;

use super::{Activations, BackwardPass, Block, Deltas, Derived};
use crate::arch::{Arch, Moe};
use crate::cpu::buffer::Buffer;
use crate::cpu::elementwise;
use crate::cpu::linear::{Backward, Batch, Forward, Output, Run, Site};
use crate::cpu::lora::Group;
use crate::cpu::model::{Experts, Gated};

/// Which experts the rows of a block go to; kept for the backward pass.
///
/// Each pair of a row and one of its experts is an assignment. Assignments are sorted by expert, and
/// by row within an expert.
#[derive(Debug)]
pub(super) struct Routing {
    /// Probability of each expert, `[rows, experts]`.
    probabilities: Buffer,
    /// Experts of each row, likeliest first, `[rows, per_token]`.
    chosen: Vec<usize>,
    /// Row of each assignment.
    rows: Vec<usize>,
    /// Weight of each assignment.
    weights: Vec<f32>,
    /// First assignment of each expert, and one past the last of all.
    starts: Vec<usize>,
    /// What each row's probabilities were divided by to become weights.
    totals: Vec<f32>,
    /// Output of each assignment before it is weighted, `[assignments, hidden]`.
    y: Buffer,
    /// One row of probabilities, or a place per expert.
    left: Vec<f32>,
    next: Vec<usize>,
}

impl Routing {
    pub(super) fn new() -> Self {
        Self {
            probabilities: Buffer::zeros(0),
            chosen: Vec::new(),
            rows: Vec::new(),
            weights: Vec::new(),
            starts: Vec::new(),
            totals: Vec::new(),
            y: Buffer::zeros(0),
            left: Vec::new(),
            next: Vec::new(),
        }
    }

    /// Floats that `rows` rows take of probabilities and outputs, the large ones.
    pub(super) fn room(arch: &Arch, moe: &Moe, rows: usize) -> [usize; 2] {
        let assignments = rows * moe.per_token;
        [rows * moe.n_experts, assignments * arch.hidden_size]
    }

    /// Makes room for `rows` rows.
    pub(super) fn reserve(&mut self, arch: &Arch, moe: &Moe, rows: usize) {
        let assignments = rows * moe.per_token;
        let [probabilities, y] = Self::room(arch, moe, rows);
        self.probabilities.reserve(probabilities);
        self.y.reserve(y);
        self.rows.resize(assignments, 0);
        self.weights.resize(assignments, 0.0);
    }

    /// Floats it holds for its rows, in the large.
    pub(super) fn len(&self) -> usize {
        self.probabilities.len() + self.y.len()
    }

    /// Turns the router's logits, in `probabilities`, into assignments.
    fn route(&mut self, moe: &Moe, rows: usize) {
        self.chosen.clear();
        self.totals.clear();
        let probabilities = &mut self.probabilities[..rows * moe.n_experts];
        for p in probabilities.chunks_exact_mut(moe.n_experts) {
            let (_, total) = elementwise::exp_and_log_sum(p);
            elementwise::scale(1.0 / total, p);
            self.left.clear();
            self.left.extend_from_slice(p);
            let mut sum = 0.0;
            for _ in 0..moe.per_token {
                let expert = elementwise::arg_max(&self.left);
                self.left[expert] = -1.0;
                self.chosen.push(expert);
                sum += p[expert];
            }
            self.totals.push(if moe.normalised { sum } else { 1.0 });
        }
        self.sort(moe);
    }

    /// Sorts the assignments by expert.
    fn sort(&mut self, moe: &Moe) {
        self.starts.clear();
        self.starts.resize(moe.n_experts + 1, 0);
        for expert in &self.chosen {
            self.starts[expert + 1] += 1;
        }
        for expert in 0..moe.n_experts {
            self.starts[expert + 1] += self.starts[expert];
        }
        self.next.clear();
        self.next.extend_from_slice(&self.starts);
        for (i, expert) in self.chosen.iter().enumerate() {
            let (row, at) = (i / moe.per_token, self.next[*expert]);
            self.next[*expert] += 1;
            self.rows[at] = row;
            let p = self.probabilities[row * moe.n_experts + expert];
            self.weights[at] = p / self.totals[row];
        }
    }

    /// The assignments of an expert.
    fn of(&self, expert: usize) -> Range<usize> {
        self.starts[expert]..self.starts[expert + 1]
    }

    /// Experts that have rows.
    fn busy(&self) -> impl Iterator<Item = (usize, Range<usize>)> {
        let each = (0..self.starts.len().saturating_sub(1)).map(|e| (e, self.of(e)));
        each.filter(|(_, range)| !range.is_empty())
    }

    /// Rows of all assignments.
    fn assigned(&self) -> &[usize] {
        &self.rows[..self.chosen.len()]
    }

    /// The runs of a batch among the rows of one expert.
    fn runs<'a>(&self, of: &Range<usize>, batch: &Batch<'a>) -> Vec<Run<'a>> {
        let rows = &self.rows[of.clone()];
        let run = |run: &Run<'a>| {
            let at = |row: usize| rows.partition_point(|r| *r < row);
            Run {
                rows: at(run.rows.start)..at(run.rows.end),
                adapter: run.adapter,
            }
        };
        let runs = batch.runs.iter().map(run);
        runs.filter(|run| !run.rows.is_empty()).collect()
    }
}

/// Copies rows of `x [.., width]` to consecutive rows of `out`.
fn gather(rows: &[usize], width: usize, x: &[f32], out: &mut [f32]) {
    for (row, out) in rows.iter().zip(out.chunks_exact_mut(width)) {
        out.copy_from_slice(&x[row * width..][..width]);
    }
}

/// Part of a buffer of rows of `width`.
fn part<'a>(of: &Range<usize>, width: usize, buffer: &'a mut [f32]) -> &'a mut [f32] {
    &mut buffer[of.start * width..of.end * width]
}

impl Block<'_> {
    /// `out = sum over experts of weight * expert(mlp_normed)`.
    pub(super) fn mix(
        &self,
        batch: &Batch<'_>,
        experts: &Experts,
        out: &mut [f32],
        acts: &mut Activations,
    ) {
        let (width, n, moe) = (self.arch.hidden_size, out.len(), &experts.moe);
        let routing = &mut acts.routing;
        let router = Forward {
            site: Site::Frozen,
            x: &acts.derived.mlp_normed[..n],
            width,
            u: &mut [],
        };
        batch.forward(
            router,
            &mut [Output {
                linear: &experts.router,
                y: &mut routing.probabilities,
            }],
        );
        routing.route(moe, batch.rows);
        self.gather(acts);
        self.enter(batch, experts, acts);
        self.activate(acts.routing.chosen.len() * moe.width, acts);
        self.leave(batch, experts, acts);
        let routing = &acts.routing;
        let weighted = routing.weights.iter().zip(routing.y.chunks_exact(width));
        out.fill(0.0);
        for (row, (weight, y)) in routing.assigned().iter().zip(weighted) {
            elementwise::add_scaled(*weight, y, &mut out[row * width..][..width]);
        }
    }

    /// Copies the input of each assignment to its place.
    fn gather(&self, acts: &mut Activations) {
        let (width, rows) = (self.arch.hidden_size, acts.routing.assigned());
        let Derived {
            mlp_normed, routed, ..
        } = &mut acts.derived;
        gather(rows, width, mlp_normed, routed);
    }

    /// What [`super::Derived`] holds of the MLP, from what is kept.
    pub(super) fn derive_mix(&self, moe: &Moe, acts: &mut Activations) {
        self.gather(acts);
        self.activate(acts.routing.chosen.len() * moe.width, acts);
    }

    /// Gate and up projections of all assignments.
    fn enter(&self, batch: &Batch<'_>, experts: &Experts, acts: &mut Activations) {
        let (width, moe) = (self.arch.hidden_size, &experts.moe);
        let routing = &acts.routing;
        for (expert, of) in routing.busy() {
            let Gated { gate, up, .. } = &experts.experts[expert];
            let runs = routing.runs(&of, batch);
            let forward = Forward {
                site: Site::Expert(self.index, expert, Group::GateUp),
                x: &acts.derived.routed[of.start * width..of.end * width],
                width,
                u: part(&of, 2 * batch.rank, &mut acts.u[Group::GateUp as usize]),
            };
            let mut outputs = [
                Output {
                    linear: gate,
                    y: part(&of, moe.width, &mut acts.gate),
                },
                Output {
                    linear: up,
                    y: part(&of, moe.width, &mut acts.up),
                },
            ];
            let batch = Batch {
                rows: of.len(),
                runs: &runs,
                ..*batch
            };
            batch.forward(forward, &mut outputs);
        }
    }

    /// Down projections of all assignments.
    fn leave(&self, batch: &Batch<'_>, experts: &Experts, acts: &mut Activations) {
        let (width, moe) = (self.arch.hidden_size, &experts.moe);
        let mut y = std::mem::replace(&mut acts.routing.y, Buffer::zeros(0));
        let routing = &acts.routing;
        for (expert, of) in routing.busy() {
            let runs = routing.runs(&of, batch);
            let forward = Forward {
                site: Site::Expert(self.index, expert, Group::Down),
                x: &acts.derived.activated[of.start * moe.width..of.end * moe.width],
                width: moe.width,
                u: part(&of, batch.rank, &mut acts.u[Group::Down as usize]),
            };
            let output = Output {
                linear: &experts.experts[expert].down,
                y: part(&of, width, &mut y),
            };
            let batch = Batch {
                rows: of.len(),
                runs: &runs,
                ..*batch
            };
            batch.forward(forward, &mut [output]);
        }
        acts.routing.y = y;
    }

    /// Backward of [`Block::mix`]: from the gradient of its output in `deltas.x` to that of its input
    /// in `deltas.normed`.
    pub(super) fn backward_mix(
        &self,
        pass: &mut BackwardPass<'_>,
        experts: &Experts,
        acts: &mut Activations,
    ) {
        let (width, moe) = (self.arch.hidden_size, &experts.moe);
        self.backward_weights(pass, moe, acts);
        let deltas = &mut *pass.deltas;
        let router = Backward {
            lora: None,
            x: &acts.derived.mlp_normed,
            u: &[],
            layers: &[(&experts.router, &deltas.router)],
        };
        let normed = Some(&mut deltas.normed[..]);
        router.run(pass.rows, normed, pass.gradient, &mut []);
        self.backward_leave(pass, experts, acts);
        let used = acts.routing.chosen.len() * moe.width;
        let (gate, up) = (&mut acts.gate[..used], &mut acts.up[..used]);
        self.activate_backward(gate, up, &pass.deltas.wide[..used]);
        self.backward_enter(pass, experts, acts);
        let Deltas { routed, normed, .. } = &mut *pass.deltas;
        let assigned = acts.routing.assigned().iter();
        for (row, dx) in assigned.zip(routed.chunks_exact(width)) {
            elementwise::add(dx, &mut normed[row * width..][..width]);
        }
    }

    /// Gradients of each assignment's output, in `deltas.routed`, and of the router's logits.
    ///
    /// With weights `w = p / s`, where `s` is the sum of the chosen `p` (or 1), and `dw = dO . y`:
    /// `dp_i = (dw_i - sum_j dw_j w_j) / s` (or `dw_i`), `dlogit = p (dp - sum_j dp_j p_j)`.
    fn backward_weights(&self, pass: &mut BackwardPass<'_>, moe: &Moe, acts: &Activations) {
        let (width, n_experts, routing) = (self.arch.hidden_size, moe.n_experts, &acts.routing);
        let Deltas {
            x: d_out,
            routed,
            router,
            ..
        } = &mut *pass.deltas;
        let router = &mut router[..pass.rows * n_experts];
        router.fill(0.0);
        for (expert, of) in routing.busy() {
            for i in of {
                let (row, weight) = (routing.rows[i], routing.weights[i]);
                let d_out = &d_out[row * width..][..width];
                let d_y = &mut routed[i * width..][..width];
                router[row * n_experts + expert] +=
                    elementwise::dot(d_out, &routing.y[i * width..][..width]);
                d_y.copy_from_slice(d_out);
                elementwise::scale(weight, d_y);
            }
        }
        let probabilities = routing.probabilities.chunks_exact(n_experts);
        let rows = router.chunks_exact_mut(n_experts).zip(probabilities);
        let chosen = routing.chosen.chunks_exact(moe.per_token);
        for (((d, p), chosen), total) in rows.zip(chosen).zip(&routing.totals) {
            // What is not chosen has `dw` 0, so sums over all experts are sums over the chosen.
            if moe.normalised {
                let mean = elementwise::dot(d, p) / total;
                for expert in chosen {
                    d[*expert] = (d[*expert] - mean) / total;
                }
            }
            let mean = elementwise::dot(d, p);
            for (d, p) in d.iter_mut().zip(p) {
                *d = p * (*d - mean);
            }
        }
    }

    /// Back through the down projections: from `deltas.routed` to `deltas.wide`.
    fn backward_leave(&self, pass: &mut BackwardPass<'_>, experts: &Experts, acts: &Activations) {
        let (width, rank) = (self.arch.hidden_size, pass.adapter.padded_rank());
        let moe = &experts.moe;
        let deltas = &mut *pass.deltas;
        for (expert, of) in acts.routing.busy() {
            let backward = Backward {
                lora: pass.adapter.expert(self.index, expert, Group::Down),
                x: &acts.derived.activated[of.start * moe.width..],
                u: &acts.u[Group::Down as usize][of.start * rank..],
                layers: &[(
                    &experts.experts[expert].down,
                    &deltas.routed[of.start * width..],
                )],
            };
            let dx = &mut deltas.wide[of.start * moe.width..];
            backward.run(of.len(), Some(dx), pass.gradient, &mut deltas.u);
        }
    }

    /// Back through the gate and up projections: from `acts.gate` and `acts.up` to `deltas.routed`.
    fn backward_enter(&self, pass: &mut BackwardPass<'_>, experts: &Experts, acts: &Activations) {
        let (width, rank) = (self.arch.hidden_size, pass.adapter.padded_rank());
        let moe = &experts.moe;
        let deltas = &mut *pass.deltas;
        for (expert, of) in acts.routing.busy() {
            let Gated { gate, up, .. } = &experts.experts[expert];
            let start = of.start * moe.width;
            let backward = Backward {
                lora: pass.adapter.expert(self.index, expert, Group::GateUp),
                x: &acts.derived.routed[of.start * width..],
                u: &acts.u[Group::GateUp as usize][of.start * 2 * rank..],
                layers: &[(gate, &acts.gate[start..]), (up, &acts.up[start..])],
            };
            let dx = &mut deltas.routed[of.start * width..];
            backward.run(of.len(), Some(dx), pass.gradient, &mut deltas.u);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOE: Moe = Moe {
        n_experts: 4,
        per_token: 2,
        width: 8,
        normalised: true,
    };

    /// Where rows with these logits go.
    fn route(moe: &Moe, logits: &[f32]) -> Routing {
        let mut routing = Routing::new();
        let rows = logits.len() / moe.n_experts;
        routing.probabilities = Buffer::from_slice(logits);
        routing.rows.resize(rows * moe.per_token, 0);
        routing.weights.resize(rows * moe.per_token, 0.0);
        routing.route(moe, rows);
        routing
    }

    #[test]
    fn rows_go_to_their_likeliest_experts_sorted_by_expert_then_row() {
        let logits = [0.0, 1.0, 2.0, -1.0, 3.0, 0.0, 1.0, 2.0, 0.0, 0.5, -2.0, 0.4];

        let routing = route(&MOE, &logits);

        assert_eq!(routing.chosen, [2, 1, 0, 3, 1, 3]);
        assert_eq!(routing.starts, [0, 1, 3, 4, 6]);
        assert_eq!(routing.assigned(), [1, 0, 2, 0, 1, 2]);
        let e = std::f32::consts::E;
        let wanted = [e, 1.0, 1.0 / (1.0 + (-0.1f32).exp())];
        let wanted = [wanted[0] / (1.0 + e), wanted[1] / (1.0 + e), wanted[2]];
        for (weight, wanted) in routing.weights.iter().zip(wanted) {
            assert!((weight - wanted).abs() < 1e-6, "{weight} {wanted}");
        }
    }

    #[test]
    fn weights_are_probabilities_unless_they_are_normalised() {
        let moe = Moe {
            normalised: false,
            ..MOE
        };

        let routing = route(&moe, &[0.0; 4]);

        // Of equals the first.
        assert_eq!(routing.chosen, [0, 1]);
        assert_eq!(routing.weights, [0.25, 0.25]);
    }

    #[test]
    fn a_row_that_is_not_a_number_goes_somewhere() {
        let routing = route(&MOE, &[f32::NAN; 8]);

        assert_eq!(routing.assigned().len(), 4);
        assert!(routing.assigned().iter().all(|row| *row < 2));
    }

    #[test]
    fn runs_of_a_batch_are_found_among_the_rows_of_an_expert() {
        let logits = [[5.0, 4.0, 0.0, 0.0], [0.0, 0.0, 5.0, 4.0]];
        let rows = [0, 1, 0, 0, 1].map(|kind: usize| logits[kind]).concat();
        let routing = route(&MOE, &rows);
        let run = |rows| Run {
            rows,
            adapter: None,
        };
        let batch_runs = [run(0..1), run(1..2), run(2..4), run(4..5)];
        let batch = Batch {
            rows: 5,
            runs: &batch_runs,
            rank: 0,
            pool: None,
            trains: false,
        };
        let found = |expert| -> Vec<Range<usize>> {
            let runs = routing.runs(&routing.of(expert), &batch);
            runs.into_iter().map(|run| run.rows).collect()
        };

        assert_eq!(found(0), [0..1, 1..3]);
        assert_eq!(found(2), [0..1, 1..2]);
    }
}
