//! Workers of unequal sizes: each rank holds its share of the KV, and a pull brings what each rank of the destination needs.

use baton_protocol::Role;
use baton_worker::FakeKvShape;

use crate::support::*;

const HEADS: u32 = 6;
const LAYERS: u32 = 2;

fn shape(tensor: u32, pipeline: u32) -> FakeKvShape {
    FakeKvShape {
        heads: HEADS,
        layers: LAYERS,
        tensor,
        pipeline,
    }
}

/// Every copy of a token's KV, on every rank, is looked at when the next one is chosen (`FakeCells`): a head that comes from
/// the wrong place, or not at all, changes the text.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_size_pulls_from_any_other() {
    let house = House::new().await;
    let mut api = Api::new(&house, "api").await;
    let worker = |name: &str, role, shape| {
        let mut config = house.config(name, role);
        config.fake_kv = shape;
        Worker::start(config)
    };
    let contexts = [
        worker("whole", Role::Context, shape(1, 1)),
        worker("two", Role::Context, shape(2, 1)),
        worker("three", Role::Context, shape(3, 1)),
        worker("four", Role::Context, shape(4, 1)),
        // More ranks than heads in all: neighbours hold the same one.
        worker("eight-staged", Role::Context, shape(8, 2)),
    ];
    let decodes = [
        (worker("one", Role::Decode, shape(1, 1)), 1),
        (worker("halves", Role::Decode, shape(2, 1)), 1),
        // Of 6 heads 8 ranks hold one each, two of them one that another has too.
        (worker("replicas", Role::Decode, shape(8, 1)), 8),
    ];
    for (decode, ranks) in &decodes {
        for (seed, context) in (1..).zip(&contexts) {
            api.until_ready(&decode.id, &context.id).await;
            let (request, sequence) = (new_request(), prompt(seed, 45, 20));
            let handle = api.staged(&context.id, request, &sequence).await;
            api.admitted(&decode.id, &api.decode_job(request, &sequence, &handle))
                .await;
            let stream = api.stream(request, 0).await;
            assert_whole(&stream, &sequence, &handle);
            let heads = (*ranks).max(HEADS);
            let bytes = 45_u32.div_ceil(8) * 8 * 8 * heads * LAYERS;
            let pulled = stream.pulled.expect("it was pulled");
            assert_eq!(
                pulled.bytes,
                u64::from(bytes),
                "each byte once for each rank"
            );
        }
    }
    for worker in contexts
        .iter()
        .chain(decodes.iter().map(|(worker, _)| worker))
    {
        api.until_empty(&worker.id).await;
    }
    for worker in contexts
        .into_iter()
        .chain(decodes.into_iter().map(|(worker, _)| worker))
    {
        worker.stop().await;
    }
}
