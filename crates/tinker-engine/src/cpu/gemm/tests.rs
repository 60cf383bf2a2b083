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
fn a_transpose_has_each_element_at_its_mirrored_place() {
    for (rows, n) in [(1, 5), (3, 8), (4, 4), (13, 48), (64, 7)] {
        let data = values(rows * n, 3);
        assert_eq!(tile::transposed(&data, n), transpose(rows, n, &data));
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

    assert_eq!(back.cols().data(), panels.cols().data());
    let mut column = vec![0.0; k];
    back.column(69, &mut column);
    assert_eq!(column, b[69 * k..]);
}

#[test]
fn rounded_rows_give_the_bits_of_rows_that_were_rounded() {
    for (m, n, k) in SHAPES {
        let (a, b) = (values(m * k, 1), values(k * n, 2));
        let mut rounded = a.clone();
        elementwise::round_to_bf16(&mut rounded);
        for isa in Isa::available() {
            let run = |left: Rows<'_>| {
                let mut out = vec![0.0; m * n];
                let right = Cols::row_major(&b, k, n, n);
                let products = &mut [Product::new(right, &mut out, n, Store::Replace)];
                matmul_at(isa, m, k, left, products);
                out
            };
            let wanted = run(Rows::row_major(&rounded, k));
            assert!(run(Rows::rounded(&a, k)) == wanted, "{isa:?} {m} {n} {k}");
        }
    }
}

/// Units that multiply tiles: those that the machine has, and the emulation of one.
#[cfg(target_arch = "x86_64")]
mod tiles {
    use super::*;
    use crate::cpu::amx::{self, Tiles};
    use crate::cpu::tile::TileUnit;

    /// A right factor in each form that a unit reads.
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

    /// One way to compute a product.
    struct Case<'a> {
        name: String,
        right: Cols<'a>,
        /// Its values.
        b: &'a [f32],
        /// Whether the left factor is rounded to bf16.
        rounds: bool,
    }

    impl Factors {
        fn new(k: usize, n: usize, seed: u32) -> Self {
            Self::of(k, n, values(k * n, seed))
        }

        fn of(k: usize, n: usize, plain: Vec<f32>) -> Self {
            let mut rounded = plain.clone();
            elementwise::round_to_bf16(&mut rounded);
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

        /// The factor in each form, for one unit.
        fn cases(&self, unit: TileUnit) -> Vec<Case<'_>> {
            let row_major = Cols::row_major(&self.plain, self.k, self.n, self.n);
            let of_one_part = [
                ("tiles", self.tiles.cols(), &self.rounded),
                ("turned tiles", self.turned.turned(), &self.rounded),
                ("rounded panels", self.panels.cols().round(), &self.rounded),
            ];
            let of_three = [
                ("panels", self.panels.cols().split(), &self.plain),
                ("rows", row_major.split(), &self.plain),
            ];
            let mut cases = Vec::new();
            for rounds in [true, false] {
                // Pairs of bf16 numbers are all that dot products take.
                let forms = match (unit, rounds) {
                    (TileUnit::Dots, false) => continue,
                    (TileUnit::Dots, true) => of_one_part.to_vec(),
                    _ => of_one_part.into_iter().chain(of_three).collect(),
                };
                cases.extend(forms.into_iter().map(|(form, right, b)| Case {
                    name: format!("{unit:?}, {form}, rounded: {rounds}"),
                    right: right.on(unit),
                    b,
                    rounds,
                }));
            }
            cases
        }
    }

    impl Case<'_> {
        fn left<'a>(&self, a: &'a [f32]) -> Rows<'a> {
            let k = self.right.k();
            if self.rounds {
                Rows::rounded(a, k)
            } else {
                Rows::row_major(a, k)
            }
        }

        fn run(&self, m: usize, a: &[f32], c: &[f32]) -> Vec<f32> {
            run(m, self.left(a), self.right, c)
        }

        /// The left factor that is multiplied.
        fn values(&self, a: &[f32]) -> Vec<f32> {
            let mut a = a.to_vec();
            if self.rounds {
                elementwise::round_to_bf16(&mut a);
            }
            a
        }
    }

    /// The units there are to test, and says which are not.
    #[expect(clippy::print_stderr, reason = "what is not tested")]
    fn units() -> Vec<TileUnit> {
        let mut units = vec![TileUnit::Emulated];
        for (unit, is_there, name, made) in [
            (
                TileUnit::Dots,
                amx::has_dots(),
                "AVX512-BF16",
                "AMD of 2022 or Intel of 2023",
            ),
            (
                TileUnit::Amx,
                amx::is_available(),
                "AMX",
                "Intel Xeon of 2023",
            ),
        ] {
            if is_there {
                units.push(unit);
            } else {
                eprintln!("{unit:?} is not tested: this machine has no {name} ({made} or later)");
            }
        }
        units
    }

    fn run(m: usize, left: Rows<'_>, right: Cols<'_>, c: &[f32]) -> Vec<f32> {
        let mut out = c.to_vec();
        let products = &mut [Product::new(right, &mut out, right.n(), Store::Add)];
        matmul(m, right.k(), left, products);
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
    fn agree_with_the_definition_to_the_accuracy_of_f32() {
        let shapes = SHAPES
            .into_iter()
            .chain([(270, 70, 730), (33, 64, 16), (16, 90, 64)]);
        for (m, n, k) in shapes {
            let (a, c) = (values(m * k, 1), values(m * n, 3));
            let factors = Factors::new(k, n, 2);
            for case in units().into_iter().flat_map(|unit| factors.cases(unit)) {
                let expected = product(m, n, k, &case.values(&a), case.b, &c);
                let off = distance(&case.run(m, &a, &c), &expected);
                let vectors = run(m, case.left(&a), Cols::row_major(case.b, k, n, n), &c);
                let allowed = 2.0 * distance(&vectors, &expected) + 1e-7;
                let name = &case.name;
                assert!(off < allowed, "{name} {m} {n} {k}: {off} of {allowed}");
            }
        }
    }

    #[test]
    fn the_matrix_unit_gives_the_bits_of_its_emulation() {
        if !units().contains(&TileUnit::Amx) {
            return;
        }
        for (m, n, k) in [(1, 1, 1), (5, 40, 17), (40, 77, 300), (300, 70, 1100)] {
            let (a, c) = (values(m * k, 1), values(m * n, 3));
            let factors = Factors::new(k, n, 2);
            let emulated = factors.cases(TileUnit::Emulated);
            for (case, emulated) in factors.cases(TileUnit::Amx).iter().zip(&emulated) {
                let wanted = emulated.run(m, &a, &c);
                assert!(case.run(m, &a, &c) == wanted, "{} {m} {n} {k}", case.name);
            }
        }
    }

    #[test]
    fn a_row_has_the_same_bits_whatever_stands_beside_it() {
        let (m, n, k) = (300, 40, 730);
        let (a, c) = (values(m * k, 4), values(m * n, 6));
        let factors = Factors::new(k, n, 5);
        for case in units().into_iter().flat_map(|unit| factors.cases(unit)) {
            let all = case.run(m, &a, &c);
            for (row, rows) in [(0, 1), (17, 2), (40, 16), (100, 31), (120, 33), (130, 100)] {
                let (of_a, of_c) = (row * k..(row + rows) * k, row * n..(row + rows) * n);
                let some = case.run(rows, &a[of_a], &c[of_c.clone()]);
                assert!(some == all[of_c], "{}, rows {row} and {rows} on", case.name);
            }
        }
    }

    #[test]
    fn a_column_has_the_same_bits_whatever_stands_beside_it() {
        let (m, n, k) = (40, 77, 300);
        let (a, b) = (values(m * k, 4), values(k * n, 5));
        for unit in units().into_iter().filter(|unit| *unit != TileUnit::Dots) {
            for left in [Rows::row_major(&a, k), Rows::rounded(&a, k)] {
                let right = Cols::row_major(&b, k, n, n).split().on(unit);
                let all = run(m, left, right, &vec![0.0; m * n]);
                for (first, columns) in [(0, 1), (3, 16), (10, 33), (45, 32)] {
                    let part = Cols::row_major(&b[first..], k, columns, n).split().on(unit);
                    let some = run(m, left, part, &vec![0.0; m * columns]);
                    for (all, some) in all.chunks(n).zip(some.chunks(columns)) {
                        assert_eq!(all[first..first + columns], *some);
                    }
                }
            }
        }
    }

    /// More columns than stay in the cache are multiplied in several turns, of which one may end within a factor
    /// and begin the next. The inner dimension has several stretches.
    #[test]
    fn factors_in_a_row_have_the_bits_of_each_alone() {
        let (m, k) = (33, 400);
        let a = values(m * k, 4);
        let widths = [5, 70, 150];
        let factors = widths.map(|n| Factors::new(k, n, n as u32));
        for unit in units() {
            let sets: Vec<Vec<Case<'_>>> = factors.iter().map(|f| f.cases(unit)).collect();
            for i in 0..sets[0].len() {
                // Each factor in another form, on the same rows.
                let forms = (0..sets.len()).map(|set| (i + set) % sets[0].len());
                let cases: Vec<_> = sets
                    .iter()
                    .zip(forms)
                    .filter_map(|(set, form)| set.get(form))
                    .filter(|case| case.rounds == sets[0][i].rounds)
                    .collect();
                let mut found: Vec<_> = widths.map(|n| vec![0.0; m * n]).to_vec();
                let mut products: Vec<_> = cases
                    .iter()
                    .map(|case| case.right)
                    .zip(&mut found)
                    .map(|(right, out)| {
                        Product::new(right, &mut out[..m * right.n()], right.n(), Store::Replace)
                    })
                    .collect();
                matmul(m, k, sets[0][i].left(&a), &mut products);
                drop(products);
                for (case, found) in cases.iter().zip(&found) {
                    let n = case.right.n();
                    for row in [0, 31, 32] {
                        let alone = case.run(1, &a[row * k..][..k], &vec![0.0; n]);
                        assert!(found[row * n..][..n] == alone, "{}, row {row}", case.name);
                    }
                }
            }
        }
    }

    /// Numbers of which truncated parts would lose four units in the last place: `1 + 2^-7 - 2^-23`.
    #[test]
    fn a_product_of_three_parts_is_off_by_about_one_rounding() {
        let worst = f32::from_bits(0x3f80_ffff);
        for unit in units().into_iter().filter(|unit| *unit != TileUnit::Dots) {
            for (a, b) in [
                (worst, worst),
                (worst, -worst),
                (worst, 1.0 / 3.0),
                (0.1, 0.3),
            ] {
                let exact = f64::from(a) * f64::from(b);
                let right = [b];
                let right = Cols::row_major(&right, 1, 1, 1).split().on(unit);

                let out = run(1, Rows::row_major(&[a], 1), right, &[0.0]);

                let off = (f64::from(out[0]) / exact - 1.0).abs();
                assert!(off < 1.5e-7, "{unit:?}, {a} times {b}: off by {off:e}");
            }
        }
    }

    #[test]
    fn turned_tiles_give_the_bits_of_tiles() {
        for unit in units() {
            for (m, n, k) in [(1, 1, 1), (40, 77, 300), (300, 100, 730), (64, 64, 32)] {
                let (a, c) = (values(m * k, 4), values(m * n, 6));
                let factors = Factors::new(k, n, 5);
                for left in [Rows::rounded(&a, k), Rows::row_major(&a, k)] {
                    if unit == TileUnit::Dots && !left.is_rounded() {
                        continue;
                    }
                    let wanted = run(m, left, factors.tiles.cols().on(unit), &c);
                    let turned = factors.turned.turned().on(unit);
                    assert!(run(m, left, turned, &c) == wanted, "{unit:?} {m} {n} {k}");
                }
            }
        }
    }

    #[test]
    fn write_and_replace_their_columns_alone() {
        for (m, n, k, stride) in [(13, 45, 9, 50), (40, 77, 300, 90), (64, 64, 64, 64)] {
            let a = values(m * k, 6);
            let factors = Factors::new(k, n, 7);
            for case in units().into_iter().flat_map(|unit| factors.cases(unit)) {
                let mut out = vec![7.0; m * stride];
                let products = &mut [Product::new(case.right, &mut out, stride, Store::Replace)];
                matmul(m, k, case.left(&a), products);
                let expected = product(m, n, k, &case.values(&a), case.b, &vec![0.0; m * n]);
                for (row, expected) in out.chunks(stride).zip(expected.chunks(n)) {
                    assert!(row[n..].iter().all(|x| *x == 7.0), "{}", case.name);
                    assert!(distance(&row[..n], expected) < 1e-5, "{}", case.name);
                }
            }
        }
    }

    #[test]
    fn threads_do_not_change_a_product() {
        let pool = Pool::new(3);
        let (n, k) = (200, 300);
        let factors = Factors::new(k, n, 9);
        for m in [1, 5, 17, 200] {
            let a = values(m * k, 4);
            for case in units().into_iter().flat_map(|unit| factors.cases(unit)) {
                let mut out = vec![0.0; m * n];
                let products = &mut [Product::new(case.right, &mut out, n, Store::Replace)];
                matmul_on(&pool, m, k, case.left(&a), products);
                let wanted = case.run(m, &a, &vec![0.0; m * n]);
                assert!(out == wanted, "{}, {m} rows", case.name);
            }
        }
    }

    #[test]
    fn infinities_and_nan_stay_out_of_range() {
        let bad = [
            f32::INFINITY,
            f32::NAN,
            -f32::NAN,
            f32::from_bits(0x7f80_0001),
        ];
        for x in bad {
            for unit in units() {
                for (a, b) in [(x, 1.0), (1.0, x)] {
                    let factors = Factors::of(1, 1, vec![b]);
                    for case in factors.cases(unit) {
                        let out = case.run(1, &[a], &[0.0]);
                        let is_bad = !a.is_finite() || !case.b[0].is_finite();
                        assert!(!(is_bad && out[0].is_finite()), "{}: {a} {b}", case.name);
                    }
                }
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
