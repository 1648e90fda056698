//! What a target was built without: servers are built with and without lz4 and xml, so a pair of which only the source has
//! them is looked for among those of this machine.

use std::fs;

use pgcutover::demo::cluster::Installation;
use pgcutover::migration::preflight::Outcome;

use crate::rig::Rig;
use crate::{found, silent, support, validate};

/// The library; the first major that uses it; what makes the rule speak, what it names, and what mends it.
const FEATURES: &[(&str, u16, &str, &str, &str)] = &[
    (
        "liblz4.",
        14,
        "CREATE TABLE squeezed (id int PRIMARY KEY, body text COMPRESSION lz4)",
        "public.squeezed.body is compressed by lz4",
        "ALTER TABLE squeezed ALTER body SET COMPRESSION pglz",
    ),
    (
        "libxml2",
        10,
        "CREATE TABLE marked (id int PRIMARY KEY, x xml, l xml[]); CREATE VIEW marks AS SELECT id, xmlelement(name a) AS e FROM t",
        "public.marks uses xml",
        "DROP VIEW marks; DROP TABLE marked",
    ),
];

/// Whether the server was linked with a library.
fn uses(installation: &Installation, library: &str) -> bool {
    let program = fs::read(installation.bindir.join("postgres")).expect("the program");
    program.windows(library.len()).any(|bytes| bytes == library.as_bytes())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_target_was_built_without_is_named() {
    let all = support::installations();
    for (library, since, breaks, names, mends) in FEATURES {
        let sources = all.all().iter().filter(|one| one.major >= *since && uses(one, library));
        let without: Vec<&Installation> = all.all().iter().filter(|one| !uses(one, library)).collect();
        let pair = sources
            .filter_map(|source| Some((source, *without.iter().find(|target| target.major >= source.major)?)))
            .next();
        let Some((source, target)) = pair else {
            eprintln!("not tested: no two servers of this machine of which only the newer one lacks {library}");
            continue;
        };
        let rig = Rig::of(support::two_clusters_of((source, target), |options| options, |options| options));
        rig.make_source("CREATE TABLE t (id int PRIMARY KEY)").await;
        silent(&validate(&rig, &rig.source, &rig.whole, false).await, "build_features");
        rig.on_source(breaks).await;
        let spoken = validate(&rig, &rig.source, &rig.whole, false).await;
        assert_eq!(spoken["build_features"].outcome, Outcome::Failed, "{library}");
        found(&spoken, "build_features", names);
        rig.on_source(mends).await;
        silent(&validate(&rig, &rig.source, &rig.whole, false).await, "build_features");
    }
}
