//! Transaction pooling, frame by frame: where a cut, an order of frames or a text must not mislead the proxy.

use crate::pooling::{first_row, pooled_with};
use crate::support::one_cluster;

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_cut_where_a_block_ends_is_seen() {
    let cluster = one_cluster("cut");
    let rig = pooled_with(&cluster, 1, |config| config.limits.buffer_bytes = 8192);
    let (mut ann, mut bob) = (rig.wire("postgres").await, rig.wire("postgres").await);
    // PostgreSQL sends 8192 bytes at a time: the cut wanders through every message behind the row.
    for length in 8100..8140 {
        // After a short answer the block is a small one.
        assert_eq!(first_row(&mut ann, "SELECT 'ann'").await, "ann");
        let row = first_row(&mut ann, &format!("SELECT repeat('x', {length})")).await;
        assert_eq!(row.len(), length);
        assert_eq!(first_row(&mut bob, "SELECT 'bob'").await, "bob", "{length}");
    }
    rig.stop().await;
}
