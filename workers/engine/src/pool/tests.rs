use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

const BLOCK_TOKENS: usize = 4;

/// KV without a salt may be used.
const ANYBODYS: Option<CacheSalt> = Some(CacheSalt::NONE);

fn tokens(seed: u32, count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| seed * 1000 + i).collect()
}

fn written(pool: &BlockPool, tokens: &[u32]) -> BlockTable {
    let mut table = pool.admit(tokens, ANYBODYS, 0).expect("room");
    drop(table.index(CacheSalt::NONE, tokens));
    table
}

#[test]
fn dropping_a_table_returns_its_blocks() {
    let pool = BlockPool::new(10, 4);
    let table = pool.reserve(7).expect("room");
    assert_eq!(table.runs().len(), 1);
    assert!(pool.reserve(4).is_none());
    assert_eq!(pool.stats().used, 7);
    std::thread::spawn(move || drop(table))
        .join()
        .expect("no panic");
    assert_eq!(
        pool.stats(),
        PoolStats {
            total: 10,
            free: 10,
            ..PoolStats::default()
        }
    );
    pool.check().expect("sound");
}

#[test]
fn a_prefix_is_shared_and_outlives_its_sequence() {
    let pool = BlockPool::new(16, 4);
    let prompt = tokens(1, 10);
    let first = written(&pool, &prompt);
    assert_eq!(first.indexed(), 2);
    let second = pool.admit(&prompt, ANYBODYS, 0).expect("room");
    assert_eq!(second.ids()[..2], first.ids()[..2]);
    assert_ne!(second.ids()[2], first.ids()[2]);
    assert!(!pool.is_private(second.ids()[0]));
    drop((first, second));
    let stats = pool.stats();
    assert_eq!((stats.used, stats.cached, stats.free), (0, 2, 14));
    assert_eq!(pool.admit(&prompt, ANYBODYS, 0).expect("room").indexed(), 2);
    assert_eq!(pool.admit(&prompt, None, 0).expect("room").indexed(), 0);
    pool.check().expect("sound");
}

#[test]
fn what_was_brought_here_is_a_prefix_and_what_is_shared_stays() {
    let pool = BlockPool::new(8, 4);
    let (prompt, salt) = (tokens(1, 10), CacheSalt(7));
    let shared = |tokens: &[u32], salt| pool.share(tokens, salt).indexed();
    assert_eq!(shared(&prompt, salt), 0);
    let brought = pool.reserve_reusing(&prompt[..8], salt, 2, 0);
    brought.expect("room").keep(salt, &prompt[..8]);
    assert_eq!((pool.stats().cached, pool.stats().used), (2, 0));
    assert_eq!(shared(&prompt, salt), 2);
    assert_eq!(shared(&prompt, CacheSalt(8)), 0, "another's");
    let mut other = prompt.clone();
    other[5] += 1;
    assert_eq!(shared(&other, salt), 1, "they part in the second block");
    other[0] += 1;
    assert_eq!(shared(&other, salt), 0);
    // However much room is wanted.
    let held = pool.share(&prompt, salt);
    assert_eq!(held.len(), 2);
    assert!(pool.reserve(7).is_none());
    drop(pool.reserve(6).expect("room"));
    assert_eq!(shared(&prompt, salt), 2);
    drop(held);
    drop(pool.reserve(7).expect("room"));
    assert!(shared(&prompt, salt) < 2);
    pool.check().expect("sound");
}

#[test]
fn the_last_token_is_always_left_to_compute() {
    let pool = BlockPool::new(16, 4);
    drop(written(&pool, &tokens(1, 8)));
    assert_eq!(
        pool.admit(&tokens(1, 8), ANYBODYS, 0)
            .expect("room")
            .indexed(),
        1
    );
    assert_eq!(
        pool.admit(&tokens(1, 9), ANYBODYS, 0)
            .expect("room")
            .indexed(),
        2
    );
    assert_eq!(
        pool.admit(&tokens(1, 4), ANYBODYS, 0)
            .expect("room")
            .indexed(),
        0
    );
}

#[test]
fn blocks_being_written_are_not_shared() {
    let pool = BlockPool::new(16, 4);
    let prompt = tokens(1, 9);
    let mut writing = pool.admit(&prompt, ANYBODYS, 0).expect("room");
    assert_eq!(pool.admit(&prompt, ANYBODYS, 0).expect("room").indexed(), 0);
    drop(writing.index(CacheSalt::NONE, &prompt[..5]));
    assert_eq!(pool.admit(&prompt, ANYBODYS, 0).expect("room").indexed(), 1);
}

#[test]
fn equal_blocks_written_twice_become_one() {
    let pool = BlockPool::new(16, 4);
    let prompt = tokens(1, 9);
    let mut a = pool.admit(&prompt, ANYBODYS, 0).expect("room");
    let mut b = pool.admit(&prompt, ANYBODYS, 0).expect("room");
    assert_eq!(pool.stats().used, 6);
    drop(a.index(CacheSalt::NONE, &prompt));
    drop(b.index(CacheSalt::NONE, &prompt));
    assert_eq!(a.ids()[..2], b.ids()[..2]);
    assert_eq!(pool.stats().used, 4);
    pool.check().expect("sound");
}

#[test]
fn leaves_go_first_and_the_oldest_of_them() {
    let pool = BlockPool::new(6, 4);
    drop(written(&pool, &tokens(1, 12)));
    drop(written(&pool, &tokens(2, 8)));
    assert_eq!(pool.stats().cached, 5);
    let hog = pool.reserve(3).expect("room");
    assert_eq!(pool.stats().cached, 3);
    drop(hog);
    // Of the older prompt the two deepest blocks went, its first stayed.
    assert_eq!(
        pool.admit(&tokens(1, 13), ANYBODYS, 0)
            .expect("room")
            .indexed(),
        1
    );
    assert_eq!(
        pool.admit(&tokens(2, 9), ANYBODYS, 0)
            .expect("room")
            .indexed(),
        2
    );
}

#[test]
fn a_refused_admission_takes_nothing() {
    let pool = BlockPool::new(4, 4);
    drop(written(&pool, &tokens(1, 8)));
    let before = pool.stats();
    assert!(pool.admit(&tokens(1, 17), ANYBODYS, 0).is_none());
    assert!(pool.admit(&tokens(1, 13), ANYBODYS, 1).is_none());
    assert_eq!(pool.stats(), before);
    assert_eq!(
        pool.admit(&tokens(1, 13), ANYBODYS, 0).expect("room").len(),
        4
    );
}

#[test]
fn quarantine_lasts_until_the_drop() {
    let pool = BlockPool::new(8, 4);
    let mut table = pool.reserve(3).expect("room");
    table.quarantine();
    table.quarantine();
    let stats = pool.stats();
    assert_eq!((stats.used, stats.quarantined, stats.free), (0, 3, 5));
    assert!(pool.reserve(6).is_none());
    pool.check().expect("sound");
    drop(table);
    assert_eq!(pool.stats().free, 8);
}

#[test]
fn an_index_is_told_in_pages_and_of_a_large_arena_a_part() {
    let page = PREFIX_PAGE_MAX as u32;
    let pool = BlockPool::new(page + 9, 1);
    assert!(!pool.tells_part());
    let prompt: Vec<u32> = (0..page + 3).collect();
    let table = written(&pool, &prompt);
    let (mut told, next) = pool.prefix_page(0);
    assert_eq!(next, Some(page));
    let (more, next) = pool.prefix_page(page);
    assert_eq!(next, None);
    told.extend(more);
    let mut chain = baton_protocol::prefix_chain(CacheSalt::NONE, 1, &prompt);
    told.sort_unstable();
    chain.sort_unstable();
    assert_eq!(told, chain);
    drop(table);
    for first in [page + 9, u32::MAX] {
        assert_eq!(pool.prefix_page(first), (Vec::new(), None));
    }

    let large = BlockPool::new(PREFIX_BLOCKS_MAX + 1, 1);
    assert!(large.tells_part());
    large.on_prefix_change(|| {});
    let mut beyond = large.reserve(PREFIX_BLOCKS_MAX as usize + 1).expect("room");
    let tokens: Vec<u32> = (0..=PREFIX_BLOCKS_MAX).collect();
    let mut told = 0;
    for end in (PREFIX_BLOCKS_MAX / 8..=PREFIX_BLOCKS_MAX + 1)
        .step_by(PREFIX_BLOCKS_MAX as usize / 8)
        .chain([PREFIX_BLOCKS_MAX + 1])
    {
        drop(beyond.index(CacheSalt::NONE, &tokens[..end as usize]));
        told += large.take_prefix_changes().changes.len();
    }
    assert_eq!(told, PREFIX_BLOCKS_MAX as usize);
    assert_eq!(large.prefix_page(PREFIX_BLOCKS_MAX), (Vec::new(), None));
}

/// Two of them differ in one half of their salts each.
const TENANTS: [CacheSalt; 3] = [CacheSalt::NONE, CacheSalt(1), CacheSalt(1 << 64)];

#[derive(Clone, Debug)]
enum Action {
    Reserve(usize),
    Admit {
        salt: CacheSalt,
        prompt: u32,
        tokens: usize,
        /// Its KV comes from elsewhere.
        is_pulled: bool,
    },
    Write {
        table: usize,
    },
    Grow {
        table: usize,
    },
    Quarantine {
        table: usize,
    },
    Forget {
        table: usize,
    },
    Drop {
        table: usize,
    },
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        2 => (0usize..8).prop_map(Action::Reserve),
        4 => (0usize..3, 0u32..3, 1usize..40, any::<bool>()).prop_map(|(tenant, prompt, tokens, is_pulled)| {
            Action::Admit { salt: TENANTS[tenant], prompt, tokens, is_pulled }
        }),
        4 => (0usize..16).prop_map(|table| Action::Write { table }),
        3 => (0usize..16).prop_map(|table| Action::Grow { table }),
        1 => (0usize..16).prop_map(|table| Action::Quarantine { table }),
        1 => (0usize..16).prop_map(|table| Action::Forget { table }),
        4 => (0usize..16).prop_map(|table| Action::Drop { table }),
    ]
}

proptest! {
    /// Whatever happens: the books agree, no block has two owners that may write it, a prefix is found
    /// only for its own salt and tokens, whoever hears of all changes knows what is in the index, and in the end every block is back.
    #[test]
    fn no_block_is_lost_or_owned_twice(actions in prop::collection::vec(action(), 1..80)) {
        let pool = BlockPool::new(24, BLOCK_TOKENS as u32);
        pool.on_prefix_change(|| {});
        let mut told = BTreeSet::new();
        // What each block of the arena holds: whose it is, and the tokens up to its end.
        let mut contents: Vec<(CacheSalt, Vec<u32>)> = vec![Default::default(); 24];
        let mut tables: Vec<(BlockTable, CacheSalt, Vec<u32>)> = Vec::new();
        for action in actions {
            let available = pool.stats().available();
            match action {
                Action::Reserve(blocks) => {
                    let table = pool.reserve(blocks);
                    prop_assert_eq!(table.is_some(), blocks <= available);
                    tables.extend(table.map(|table| (table, CacheSalt::NONE, Vec::new())));
                }
                Action::Admit { salt, prompt, tokens: count, is_pulled } => {
                    // Prompts share beginnings of different lengths.
                    let mut prompt_tokens = tokens(0, count.min(6 * prompt as usize + 5));
                    prompt_tokens.extend(tokens(prompt + 1, count - prompt_tokens.len()));
                    let admitted = match is_pulled {
                        true => pool.reserve_reusing(&prompt_tokens, salt, count.div_ceil(BLOCK_TOKENS), 0),
                        false => pool.admit(&prompt_tokens, Some(salt), 0),
                    };
                    if let Some(table) = admitted {
                        for (i, block) in table.ids()[..table.indexed()].iter().enumerate() {
                            let (of, held) = &contents[*block as usize];
                            prop_assert_eq!(*of, salt);
                            prop_assert_eq!(held, &prompt_tokens[..(i + 1) * BLOCK_TOKENS]);
                        }
                        prop_assert!(table.indexed() * BLOCK_TOKENS < count + usize::from(is_pulled));
                        tables.push((table, salt, prompt_tokens));
                    } else {
                        prop_assert!(count.div_ceil(BLOCK_TOKENS) > available);
                    }
                }
                Action::Write { table } if !tables.is_empty() => {
                    let at = table % tables.len();
                    let (table, salt, tokens) = &mut tables[at];
                    for (i, block) in table.ids().iter().enumerate().skip(table.indexed()) {
                        prop_assert!(pool.is_private(*block));
                        let end = ((i + 1) * BLOCK_TOKENS).min(tokens.len());
                        contents[*block as usize] = (*salt, tokens[..end].to_vec());
                    }
                    let private = !table.is_empty() && pool.state().quarantined[table.ids()[table.len() - 1] as usize];
                    if !private {
                        drop(table.index(*salt, tokens));
                    }
                }
                Action::Grow { table } if !tables.is_empty() => {
                    let at = table % tables.len();
                    let grown = tables[at].0.grow();
                    prop_assert_eq!(grown, available > 0);
                }
                Action::Quarantine { table } if !tables.is_empty() => {
                    let at = table % tables.len();
                    if tables[at].2.is_empty() {
                        tables[at].0.quarantine();
                    }
                }
                Action::Forget { table } if !tables.is_empty() => {
                    let at = table % tables.len();
                    let (table, ..) = tables.swap_remove(at);
                    table.forget();
                    let shared = |block: u32| pool.state().holders[block as usize] > 1;
                    prop_assert!(table.ids().iter().all(|block| pool.is_private(*block) || shared(*block)));
                    prop_assert!(pool.check().is_ok());
                }
                Action::Drop { table } if !tables.is_empty() => {
                    let at = table % tables.len();
                    drop(tables.swap_remove(at));
                }
                _ => {}
            }
            let checked = pool.check();
            prop_assert!(checked.is_ok(), "{:?}", checked);
            let PrefixChanges { changes, lost } = pool.take_prefix_changes();
            prop_assert!(!lost);
            for (link, is_in) in changes {
                prop_assert!(if is_in { told.insert(link) } else { told.remove(&link) }, "it is so already");
            }
            let (links, next) = pool.prefix_page(0);
            prop_assert_eq!(next, None);
            prop_assert_eq!(links.len(), told.len());
            prop_assert!(links.iter().all(|link| told.contains(link)));
            let mut writers = [0; 24];
            for (table, ..) in &tables {
                for block in &table.ids()[table.indexed()..] {
                    writers[*block as usize] += 1;
                }
            }
            prop_assert!(writers.iter().all(|n| *n <= 1));
        }
        drop(tables);
        let stats = pool.stats();
        prop_assert_eq!(stats.available(), 24);
        prop_assert_eq!((stats.used, stats.quarantined), (0, 0));
        prop_assert!(pool.reserve(24).is_some());
    }
}
