//! Every instruction set and shape against the definition.

use super::*;
use crate::cpu::simd::Isa;

fn values(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

fn product(m: usize, n: usize, k: usize, a: &[f32], b: &[f32], c: &[f32]) -> Vec<f64> {
    let mut out: Vec<f64> = c.iter().map(|x| f64::from(*x)).collect();
    for i in 0..m {
        for j in 0..n {
            for t in 0..k {
                out[i * n + j] += f64::from(a[i * k + t]) * f64::from(b[t * n + j]);
            }
        }
    }
    out
}

fn transpose(rows: usize, columns: usize, a: &[f32]) -> Vec<f32> {
    (0..rows * columns)
        .map(|i| a[i % rows * columns + i / rows])
        .collect()
}

const SHAPES: [(usize, usize, usize); 12] = [
    (1, 1, 1),
    (1, 600, 300),
    (2, 77, 5),
    (3, 256, 64),
    (4, 100, 33),
    (5, 40, 17),
    (6, 64, 513),
    (7, 16, 16),
    (12, 32, 256),
    (25, 45, 300),
    (64, 33, 7),
    (300, 50, 270),
];

#[test]
fn agrees_with_the_definition_for_every_shape_and_instruction_set() {
    for isa in Isa::available() {
        for (m, n, k) in SHAPES {
            let (a, b, c) = (values(m * k, 1), values(k * n, 2), values(m * n, 3));
            let expected = product(m, n, k, &a, &b, &c);
            let panels = Panels::from_columns::<()>(k, n, |j, line| {
                line.copy_from_slice(&transpose(k, n, &b)[j * k..][..k]);
                Ok(())
            })
            .unwrap();
            let a_t = transpose(m, k, &a);
            let lefts = [
                Rows::RowMajor {
                    data: &a,
                    stride: k,
                },
                Rows::Transposed {
                    data: &a_t,
                    stride: m,
                },
            ];
            for left in lefts {
                for right in [panels.cols(), Cols::row_major(&b, k, n, n)] {
                    let mut out = c.clone();
                    let mut products = [Product::new(right, &mut out, n, Store::Add)];
                    matmul_at(isa, m, k, left, &mut products);
                    for (x, y) in out.iter().zip(&expected) {
                        assert!(
                            (f64::from(*x) - y).abs() < 1e-4,
                            "{isa:?} {m} {n} {k}: {x} {y}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_whatever_stands_beside_it() {
    let (m, n, k) = (300, 200, 700);
    let (a, b) = (values(m * k, 4), values(k * n, 5));
    for isa in Isa::available() {
        let run = |m: usize, a: &[f32]| {
            let mut out = vec![0.0; m * n];
            let right = Cols::row_major(&b, k, n, n);
            let mut products = [Product::new(right, &mut out, n, Store::Replace)];
            let left = Rows::RowMajor { data: a, stride: k };
            matmul_at(isa, m, k, left, &mut products);
            out
        };
        let all = run(m, &a);
        for (row, rows) in [(0, 1), (17, 2), (40, 5), (100, 6), (120, 7), (130, 100)] {
            assert_eq!(
                run(rows, &a[row * k..(row + rows) * k]),
                all[row * n..(row + rows) * n]
            );
        }
    }
}

#[test]
fn writes_nothing_outside_its_columns() {
    let (m, n, k, stride) = (13, 45, 9, 50);
    let (a, b) = (values(m * k, 6), values(k * n, 7));
    for isa in Isa::available() {
        let mut out = vec![7.0; m * stride];
        let mut products = [Product::new(
            Cols::row_major(&b, k, n, n),
            &mut out,
            stride,
            Store::Replace,
        )];
        matmul_at(
            isa,
            m,
            k,
            Rows::RowMajor {
                data: &a,
                stride: k,
            },
            &mut products,
        );
        assert!(
            out.chunks(stride)
                .all(|row| row[n..].iter().all(|x| *x == 7.0))
        );
    }
}

#[test]
fn transposing_panels_twice_gives_them_back() {
    let (k, n) = (45, 70);
    let b = values(k * n, 8);
    let panels = Panels::from_columns::<()>(k, n, |j, line| {
        line.copy_from_slice(&b[j * k..][..k]);
        Ok(())
    })
    .unwrap();

    let back = panels.transposed().transposed();

    assert_eq!(back.data[..], panels.data[..]);
    let mut column = vec![0.0; k];
    back.column(69, &mut column);
    assert_eq!(column, b[69 * k..]);
}

/// The matrix unit, where the machine has one.
#[cfg(target_arch = "x86_64")]
mod matrix_unit {
    use super::*;
    use crate::cpu::amx::{self, Tiles};

    /// A right factor in each form that the unit reads.
    struct Factors {
        k: usize,
        n: usize,
        /// Row-major; bf16 numbers for the tiles.
        plain: Vec<f32>,
        rounded: Vec<f32>,
        panels: Panels,
        tiles: Tiles,
        /// Of the transpose.
        turned: Tiles,
    }

    impl Factors {
        fn new(k: usize, n: usize, seed: u32) -> Self {
            let plain = values(k * n, seed);
            let rounded: Vec<f32> = plain
                .iter()
                .map(|x| half::bf16::from_f32(*x).to_f32())
                .collect();
            let column = |of: &[f32], j: usize, out: &mut [f32]| {
                for (out, row) in out.iter_mut().zip(of.chunks_exact(n)) {
                    *out = row[j];
                }
                Ok::<(), ()>(())
            };
            Self {
                k,
                n,
                panels: Panels::from_columns(k, n, |j, out| column(&plain, j, out)).unwrap(),
                tiles: Tiles::from_columns(k, n, |j, out| column(&rounded, j, out)).unwrap(),
                turned: Tiles::from_columns(n, k, |t, out| {
                    out.copy_from_slice(&rounded[t * n..][..n]);
                    Ok::<(), ()>(())
                })
                .unwrap(),
                plain,
                rounded,
            }
        }

        /// The factor, and its values.
        fn each(&self) -> [(&'static str, Cols<'_>, &[f32]); 4] {
            let row_major = Cols::row_major(&self.plain, self.k, self.n, self.n);
            [
                ("tiles", self.tiles.cols(), &self.rounded),
                ("turned tiles", self.turned.turned(), &self.rounded),
                ("panels", self.panels.cols().split(), &self.plain),
                ("rows", row_major.split(), &self.plain),
            ]
        }
    }

    /// Whether there is nothing to test, and says so.
    #[expect(clippy::print_stderr, reason = "why a test is skipped")]
    fn is_absent() -> bool {
        let absent = !amx::is_available();
        if absent {
            eprintln!("skipped: this machine has no AMX; run it on an Intel Xeon of 2023 or later");
        }
        absent
    }

    fn run(m: usize, a: &[f32], right: Cols<'_>, c: &[f32]) -> Vec<f32> {
        let mut out = c.to_vec();
        let products = &mut [Product::new(right, &mut out, right.n(), Store::Add)];
        matmul(m, right.k(), Rows::row_major(a, right.k()), products);
        out
    }

    /// Root of the mean squared difference.
    fn distance(found: &[f32], expected: &[f64]) -> f64 {
        let squares = found
            .iter()
            .zip(expected)
            .map(|(x, y)| (f64::from(*x) - y).powi(2));
        (squares.sum::<f64>() / expected.len() as f64).sqrt()
    }

    #[test]
    fn agrees_with_the_definition_to_the_accuracy_of_f32() {
        if is_absent() {
            return;
        }
        let shapes = SHAPES
            .into_iter()
            .chain([(270, 70, 730), (33, 64, 16), (16, 90, 64)]);
        for (m, n, k) in shapes {
            let (a, c) = (values(m * k, 1), values(m * n, 3));
            let factors = Factors::new(k, n, 2);
            for (name, right, b) in factors.each() {
                let expected = product(m, n, k, &a, b, &c);
                let off = distance(&run(m, &a, right, &c), &expected);
                let vectors = run(m, &a, Cols::row_major(b, k, n, n), &c);
                let allowed = 2.0 * distance(&vectors, &expected) + 1e-7;
                assert!(off < allowed, "{name} {m} {n} {k}: {off} of {allowed}");
            }
        }
    }

    #[test]
    fn a_row_has_the_same_bits_whatever_stands_beside_it() {
        if is_absent() {
            return;
        }
        let (m, n, k) = (300, 200, 730);
        let (a, c) = (values(m * k, 4), values(m * n, 6));
        let factors = Factors::new(k, n, 5);
        for (name, right, _) in factors.each() {
            let all = run(m, &a, right, &c);
            for (row, rows) in [(0, 1), (17, 2), (40, 16), (100, 31), (120, 33), (130, 100)] {
                let (of_a, of_c) = (row * k..(row + rows) * k, row * n..(row + rows) * n);
                let some = run(rows, &a[of_a], right, &c[of_c.clone()]);
                assert!(some == all[of_c], "{name}, rows {row} and {rows} on");
            }
        }
    }

    #[test]
    fn a_column_has_the_same_bits_whatever_stands_beside_it() {
        if is_absent() {
            return;
        }
        let (m, n, k) = (40, 77, 300);
        let (a, b) = (values(m * k, 4), values(k * n, 5));
        let all = run(
            m,
            &a,
            Cols::row_major(&b, k, n, n).split(),
            &vec![0.0; m * n],
        );
        for (first, columns) in [(0, 1), (3, 16), (10, 33), (45, 32)] {
            let part = Cols::row_major(&b[first..], k, columns, n).split();
            let some = run(m, &a, part, &vec![0.0; m * columns]);
            for (all, some) in all.chunks(n).zip(some.chunks(columns)) {
                assert_eq!(all[first..first + columns], *some);
            }
        }
    }

    /// Numbers of which truncated parts would lose four units in the last place: `1 + 2^-7 - 2^-23`.
    #[test]
    fn a_product_is_off_by_about_one_rounding() {
        if is_absent() {
            return;
        }
        let worst = f32::from_bits(0x3f80_ffff);
        for (a, b) in [
            (worst, worst),
            (worst, -worst),
            (worst, 1.0 / 3.0),
            (0.1, 0.3),
        ] {
            let exact = f64::from(a) * f64::from(b);

            let out = run(1, &[a], Cols::row_major(&[b], 1, 1, 1).split(), &[0.0]);

            let off = (f64::from(out[0]) / exact - 1.0).abs();
            assert!(off < 1.5e-7, "{a} times {b}: off by {off:e}");
        }
    }

    #[test]
    fn turned_tiles_give_the_bits_of_tiles() {
        if is_absent() {
            return;
        }
        for (m, n, k) in [(1, 1, 1), (40, 77, 300), (300, 200, 730), (64, 64, 32)] {
            let (a, c) = (values(m * k, 4), values(m * n, 6));
            let factors = Factors::new(k, n, 5);
            let wanted = run(m, &a, factors.tiles.cols(), &c);
            assert_eq!(run(m, &a, factors.turned.turned(), &c), wanted);
        }
    }

    #[test]
    fn writes_and_replaces_its_columns_alone() {
        if is_absent() {
            return;
        }
        for (m, n, k, stride) in [(13, 45, 9, 50), (40, 77, 300, 90), (64, 64, 64, 64)] {
            let a = values(m * k, 6);
            let factors = Factors::new(k, n, 7);
            for (name, right, b) in factors.each() {
                let mut out = vec![7.0; m * stride];
                let products = &mut [Product::new(right, &mut out, stride, Store::Replace)];
                matmul(m, k, Rows::row_major(&a, k), products);
                let expected = product(m, n, k, &a, b, &vec![0.0; m * n]);
                for (row, expected) in out.chunks(stride).zip(expected.chunks(n)) {
                    assert!(row[n..].iter().all(|x| *x == 7.0), "{name}");
                    assert!(distance(&row[..n], expected) < 1e-5, "{name}");
                }
            }
        }
    }

    #[test]
    fn threads_do_not_change_a_product() {
        if is_absent() {
            return;
        }
        let pool = Pool::new(3);
        let (n, k) = (200, 300);
        let factors = Factors::new(k, n, 9);
        for m in [1, 5, 17, 200] {
            let a = values(m * k, 4);
            for (name, right, _) in factors.each() {
                let mut out = vec![0.0; m * n];
                let products = &mut [Product::new(right, &mut out, n, Store::Replace)];
                matmul_on(&pool, m, k, Rows::row_major(&a, k), products);
                assert!(
                    out == run(m, &a, right, &vec![0.0; m * n]),
                    "{name}, {m} rows"
                );
            }
        }
    }

    #[test]
    fn infinities_and_nan_stay_out_of_range() {
        if is_absent() {
            return;
        }
        for x in [f32::INFINITY, f32::NAN, f32::from_bits(0x7f80_0001)] {
            for (a, b) in [(x, 1.0), (1.0, x)] {
                let out = run(1, &[a], Cols::row_major(&[b], 1, 1, 1).split(), &[0.0]);
                assert!(!out[0].is_finite(), "{a} times {b} is {}", out[0]);
            }
        }
    }

    #[test]
    fn tiles_give_back_what_was_packed() {
        let factors = Factors::new(45, 70, 8);
        let mut column = vec![0.0; 45];

        factors.tiles.column(69, &mut column);

        let expected: Vec<f32> = factors.rounded.chunks(70).map(|row| row[69]).collect();
        assert_eq!(column, expected);
    }

    #[test]
    fn bf16_numbers_are_told_from_others() {
        assert!(amx::is_bf16(&[0.0, -1.5, f32::from_bits(0x7f7f_0000)]));
        assert!(!amx::is_bf16(&[0.0, 0.1]));
    }
}
