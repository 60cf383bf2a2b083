//! Messages of a few bytes that state huge sizes: refused, never allocated and never a panic.

use std::collections::BTreeMap;

use tinker_types::*;

#[track_caller]
fn check<T: std::fmt::Debug>(result: Result<T, TypeError>, expected: &str) {
    assert_eq!(result.unwrap_err().to_string(), expected);
}

fn output(record: proto::ArrayRecord) -> proto::ForwardBackwardOutput {
    proto::ForwardBackwardOutput {
        loss_fn_outputs: vec![record],
        ..Default::default()
    }
}

#[test]
fn a_record_stating_data_it_does_not_hold_is_refused() {
    let record = proto::ArrayRecord {
        num_datums: i64::MAX,
        ..Default::default()
    };

    check(
        ForwardBackwardOutput::try_from(&output(record)),
        "output states 9223372036854775807 data and holds 0",
    );
}

#[test]
fn a_record_of_an_overflowing_shape_is_refused() {
    let batch = proto::BatchedTensor {
        offsets: vec![0; 16].into(),
        dtype: proto::DType::Float32.into(),
        trailing_shape: vec![1 << 40, 1 << 40],
        ..Default::default()
    };
    let fields = BTreeMap::from([("logprobs".to_owned(), batch)]);
    let record = proto::ArrayRecord {
        fields,
        num_datums: 1,
        ..Default::default()
    };

    check(
        ForwardBackwardOutput::try_from(&output(record)),
        "output \"logprobs\": shape [1099511627776, 1099511627776] is too large",
    );
}

#[test]
fn a_top_k_table_of_rows_without_entries_is_refused() {
    let table = proto::TopkLogprobs {
        length: u32::MAX,
        ..Default::default()
    };
    let response = proto::SampleResponse {
        topk_prompt_logprobs: Some(table),
        ..Default::default()
    };

    check(
        SampleResponse::try_from(&response),
        "top-k table of 4294967295 x 0 holds 0 tokens and 0 log-probabilities",
    );
}

#[test]
fn sparse_tensors_too_large_to_be_made_dense_are_refused() {
    let sparse = |shape: Vec<usize>| {
        let index = SparseIndex {
            crow_indices: vec![0, 0],
            col_indices: vec![],
        };
        TensorData::sparse(TensorValues::Float32(vec![]), shape, index)
    };

    check(
        sparse(vec![1, 1 << 40]),
        "sparse tensor of shape [1, 1099511627776] has more than 67108864 cells",
    );
    check(
        sparse(vec![usize::MAX, 0]),
        "sparse tensor of shape [18446744073709551615, 0] has more than 67108864 cells",
    );
}

#[test]
fn a_model_input_whose_length_overflows_is_refused() {
    // Audio containers that state 2^55 positions each.
    let header = [&[1, 1][..], &[0x80; 7], &[0x40]].concat();
    let chunk = Chunk::Dmel {
        dmel: header.into(),
    };
    assert_eq!(chunk.length().unwrap(), 1 << 55);
    let chunks = vec![chunk; 1 << 10];

    check(ModelInput { chunks }.length(), "model input is too long");
}
