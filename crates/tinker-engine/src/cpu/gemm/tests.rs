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
