//! Splitting rows and rendering them: everything that can be wrong with data is found here, before
//! a server is asked for anything.

use tinker_chat::Renderer;

use super::config::SftConfig;
use super::data::{Dataset, Row};
use super::datum::Example;
use crate::error::{Error, Result};
use crate::shuffle::permutation;

/// Stream of the seed that decides the held-out split.
const SPLIT_STREAM: u64 = 0;

/// Rendered rows, split into those to train on and those held out.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// The examples of each training row.
    pub(crate) train: Vec<Vec<Example>>,
    /// The examples of all held-out rows.
    pub(crate) test: Vec<Example>,
    /// What there is.
    pub counts: DataCounts,
}

/// What rendering found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DataCounts {
    /// Rows in the file.
    pub n_rows: usize,
    /// Rows to train on.
    pub n_train_rows: usize,
    /// Rows held out.
    pub n_test_rows: usize,
    /// Training sequences; more than rows where a renderer splits conversations.
    pub n_sequences: usize,
    /// Tokens read in one epoch.
    pub n_tokens: usize,
    /// Tokens trained in one epoch.
    pub n_trained_tokens: usize,
    /// Longest rendered sequence in tokens, before cutting.
    pub longest: usize,
    /// Rows that were cut.
    pub n_truncated: usize,
    /// Rows left out because cutting took all their trained tokens.
    pub n_dropped: usize,
}

/// A row after rendering.
struct RenderedRow {
    examples: Vec<Example>,
    longest: usize,
    line: usize,
}

impl Prepared {
    /// Renders `data` as `config` says.
    ///
    /// # Errors
    /// A row cannot be rendered, is too long without leave to cut it, or none is left to train on.
    pub fn new(data: &Dataset, config: &SftConfig, renderer: &dyn Renderer) -> Result<Self> {
        let mut rows = Vec::with_capacity(data.rows.len());
        for row in &data.rows {
            rows.push(render_row(data, row, config, renderer)?);
        }
        let mut counts = DataCounts {
            n_rows: rows.len(),
            ..DataCounts::default()
        };
        count_long_rows(data, config, &rows, &mut counts)?;
        let (mut train, mut test) = (Vec::new(), Vec::new());
        let order = permutation(rows.len(), config.seed, SPLIT_STREAM);
        let mut is_test = vec![false; rows.len()];
        for &index in order.iter().take(config.test_size) {
            is_test[index] = true;
        }
        // File order within each part: the epochs shuffle it anyway, and people can follow it.
        for (row, is_test) in rows.into_iter().zip(is_test) {
            if row.examples.is_empty() {
                counts.n_dropped += 1;
            } else if is_test {
                counts.n_test_rows += 1;
                test.extend(row.examples);
            } else {
                train.push(row.examples);
            }
        }
        counts.count_train(&train);
        if train.is_empty() {
            let reason = format!(
                "{} rows, {} held out, {} without a trained token within {} tokens",
                counts.n_rows, counts.n_test_rows, counts.n_dropped, config.max_length
            );
            return Err(Error::NothingToTrain {
                path: data.path.clone(),
                reason,
            });
        }
        Ok(Self {
            train,
            test,
            counts,
        })
    }
}

impl DataCounts {
    fn count_train(&mut self, train: &[Vec<Example>]) {
        let examples = || train.iter().flatten();
        self.n_train_rows = train.len();
        self.n_sequences = examples().count();
        self.n_tokens = examples().map(Example::n_tokens).sum();
        self.n_trained_tokens = examples().map(Example::n_trained).sum();
    }
}

fn render_row(
    data: &Dataset,
    row: &Row,
    config: &SftConfig,
    renderer: &dyn Renderer,
) -> Result<RenderedRow> {
    let rendered = renderer
        .build_supervised_examples(&row.messages, config.train_on_what)
        .map_err(|source| Error::Render {
            path: data.path.clone(),
            line: row.line,
            source,
        })?;
    let longest = rendered
        .iter()
        .map(|example| example.tokens.len())
        .max()
        .unwrap_or(0);
    let mut examples = Vec::with_capacity(rendered.len());
    for example in &rendered {
        let example = Example::new(example, config.max_length).map_err(|error| Error::BadRow {
            path: data.path.clone(),
            line: row.line,
            column: 1,
            reason: error.to_string(),
        })?;
        examples.extend(example);
    }
    Ok(RenderedRow {
        examples,
        longest,
        line: row.line,
    })
}

fn count_long_rows(
    data: &Dataset,
    config: &SftConfig,
    rows: &[RenderedRow],
    counts: &mut DataCounts,
) -> Result<()> {
    counts.longest = rows.iter().map(|row| row.longest).max().unwrap_or(0);
    counts.n_truncated = rows
        .iter()
        .filter(|row| row.longest > config.max_length)
        .count();
    if counts.n_truncated == 0 || config.truncate {
        return Ok(());
    }
    let line = rows
        .iter()
        .find(|row| row.longest == counts.longest)
        .map_or(0, |row| row.line);
    Err(Error::RowsTooLong {
        path: data.path.clone(),
        n_long: counts.n_truncated,
        n_rows: counts.n_rows,
        max_length: config.max_length,
        longest: counts.longest,
        line,
    })
}
