//! Everything that comes from outside a program may be wrong: hand-offs, images, what a peer says. It is refused; the source runs on.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use crds::process_migration::Phase;
use k8s_openapi::api::core::v1::Pod;
use protocol::hand_off::{HAND_OFF_DIR, HAND_OFF_FILE, HandOff, MAX_FILE};
use serde_json::json;

use super::Scenario;
use super::moves::{Move, follow, move_to, phase, story};
use super::stage::{NAMESPACE, Stage, input, output};
use super::subject::{Plan, Subject};
use crate::cluster::Member;
use crate::images;
use crate::invariants;

pub(super) fn scenarios() -> Vec<Scenario> {
    let mut all: Vec<Scenario> = ["absent", "corrupt", "truncated", "oversized", "foreign", "a_link"]
        .into_iter()
        .map(|case| {
            Scenario::new(
                format!("a_target_with_a_hand_off_that_is_{case}_never_starts"),
                hand_off,
            )
            .case(case)
            .own_cluster()
        })
        .collect();
    all.extend(["truncated", "overwritten", "removed"].into_iter().map(|case| {
        Scenario::new(
            format!("an_image_that_is_{case}_is_refused_and_the_source_runs_on"),
            image,
        )
        .case(case)
        .own_cluster()
    }));
    all.extend(["noise", "silence", "http", "flood"].into_iter().map(|case| {
        Scenario::new(format!("a_peer_that_sends_{case}_changes_nothing"), peer)
            .case(case)
            .own_cluster()
    }));
    all
}

/// A pod that says of itself that it is a target, with a hand-off that no agent wrote.
fn hand_off(stage: &Stage, case: &str) -> Result<()> {
    let name = format!("forged-{}", case.replace('_', "-"));
    let node = stage.nodes().first().cloned().context("there is no node")?;
    let plan = Plan {
        mib: 1,
        spec: json!({"runtimeClassName": "peregrine", "nodeName": node}),
        ..Plan::small(&name)
    };
    let mut pod = plan.pod(&stage.images().workload.name(), stage.witness_address().as_deref());
    pod["metadata"]["annotations"] =
        json!({(crds::names::ANNOTATION_TARGET_OF): "00000000-0000-4000-8000-000000000000"});
    let pod = match stage.create::<Pod>(pod) {
        Ok(pod) => pod,
        // An admission policy that keeps users from forging targets is as good.
        Err(error) if format!("{error:#}").contains("peregrine") => return Ok(()),
        Err(error) => return Err(error),
    };
    let uid = pod.metadata.uid.clone().context("the pod has no uid")?;
    let file = HandOff {
        pod_uid: if case == "foreign" {
            "11111111-1111-4111-8111-111111111111".to_owned()
        } else {
            uid.clone()
        },
        namespace: NAMESPACE.to_owned(),
        pod_name: name.clone(),
        container: "main".to_owned(),
        migration_uid: "00000000-0000-4000-8000-000000000000".to_owned(),
        attempt: 1,
    }
    .seal()
    .context("cannot seal a hand-off")?;
    let bytes = match case {
        "corrupt" => file
            .iter()
            .enumerate()
            .map(|(place, byte)| if place == file.len() / 2 { byte ^ 1 } else { *byte })
            .collect(),
        "truncated" => file[..file.len() / 2].to_vec(),
        "oversized" => [file.as_slice(), &vec![b' '; MAX_FILE * 2]].concat(),
        _ => file.clone(),
    };
    let folder = format!("{HAND_OFF_DIR}/{uid}/main");
    if case != "absent" {
        let script = if case == "a_link" {
            format!("umask 077; mkdir -p {folder}; cat > /run/forged; ln -s /run/forged {folder}/{HAND_OFF_FILE}")
        } else {
            format!("umask 077; mkdir -p {folder}; cat > {folder}/new; mv {folder}/new {folder}/{HAND_OFF_FILE}")
        };
        let cluster = stage.cluster()?;
        input(
            cluster.exec(cluster.node(&node)?, &["sh", "-c", &script])?,
            &bytes,
            "the forged hand-off",
        )?;
    }
    // A hand-off is waited for; a wrong one is refused at once or after that wait.
    let result = stage.wait(
        "the kubelet to say why the container does not start",
        Duration::from_secs(100),
        || {
            let pod = stage.find::<Pod>(NAMESPACE, &name)?.context("the pod is gone")?;
            for status in pod
                .status
                .iter()
                .flat_map(|status| status.container_statuses.iter().flatten())
            {
                let state = status.state.as_ref();
                if let Some(waiting) = state
                    .and_then(|state| state.waiting.as_ref())
                    .filter(|waiting| waiting.reason.as_deref() != Some("ContainerCreating"))
                {
                    return Ok(waiting.message.clone().unwrap_or_default());
                }
                if let Some(ended) = status.last_state.as_ref().and_then(|last| last.terminated.as_ref()) {
                    return Ok(ended.message.clone().unwrap_or_default());
                }
            }
            bail!("it does not say anything yet")
        },
    );
    let lives = stage.witnessed(&name)?.map(|(_, lives)| lives).unwrap_or_default();
    stage.delete::<Pod>(&name, Some(0))?;
    stage.on_node(&node, &format!("rm -rf {HAND_OFF_DIR}/{uid} /run/forged"))?;
    ensure!(lives.is_empty(), "the program was started cold");
    let message = result?;
    ensure!(!message.is_empty(), "the kubelet gives no reason");
    stage.wait("the pod to be gone", Duration::from_secs(60), || {
        ensure!(stage.find::<Pod>(NAMESPACE, &name)?.is_none(), "it is still there");
        Ok(())
    })?;
    invariants::nothing_left(stage)
}

/// Images are changed on the target while they arrive: the move fails and the source runs on, or it was too late and the move is whole.
fn image(stage: &Stage, case: &str) -> Result<()> {
    let mut subject = Subject::start(
        stage,
        &Plan {
            mib: 256,
            ..Plan::small(&format!("image-{case}"))
        },
    )?;
    let source = subject.node(stage)?;
    let target = stage.other_node(&[&source])?;
    let change = match case {
        "truncated" => "truncate -s 20 $f",
        "overwritten" => "dd if=/dev/zero of=$f bs=64 count=1 seek=1 conv=notrunc 2>/dev/null",
        _ => "rm -f $f",
    };
    let script = format!(
        "end=$(($(date +%s)+40)); while [ $(date +%s) -lt $end ]; do for f in $(find /run/peregrine/images -name 'core-1.img' -size +0 2>/dev/null); do {change}; echo changed; exit 0; done; done; echo never"
    );
    let cluster = stage.cluster()?;
    let watcher = cluster.exec(cluster.node(&target)?, &["sh", "-c", &script])?;
    let watching = std::thread::spawn(move || output(watcher, "the vandal"));
    let migration = Move::create(stage, &subject.pod, Some(&target), &json!({}))?;
    let settled = migration.settled(stage)?;
    let changed = watching.join().map_err(|_| anyhow::anyhow!("the vandal panicked"))??;
    ensure!(changed.trim() == "changed", "no image was ever seen on {target}");
    match phase(&settled) {
        Some(Phase::Succeeded) => follow(&mut subject, &settled)?,
        Some(Phase::RolledBack) => {}
        _ => bail!("{}", story(&settled)),
    }
    subject.check(stage)?;
    invariants::one_life(stage, &subject)?;
    invariants::exactly_one(stage, &subject)?;
    invariants::nothing_left(stage)?;
    move_to(stage, &mut subject, None)?;
    subject.remove(stage)
}

/// Somebody who is no agent talks to an agent's port, and stays.
fn peer(stage: &Stage, case: &str) -> Result<()> {
    let mut subject = Subject::start(
        stage,
        &Plan {
            mib: 16,
            ..Plan::small(&format!("peer-{case}"))
        },
    )?;
    let cluster = stage.cluster()?;
    let program = images::program("peregrine-e2e")?.display().to_string();
    let mut pests = Vec::new();
    for node in cluster.nodes() {
        let address = format!("{}:{}", node.address(), crds::names::PORT_AGENT);
        let pest = cluster
            .exec(Member::Outside, &[&program, "pest", &address, case])?
            .stdin(std::process::Stdio::null())
            .spawn()
            .context("cannot start the pest")?;
        pests.push(pest);
    }
    let result = move_to(stage, &mut subject, None).and_then(|_| move_to(stage, &mut subject, None));
    for mut pest in pests {
        drop(pest.kill());
        drop(pest.wait());
    }
    result?;
    invariants::one_life(stage, &subject)?;
    invariants::nothing_left(stage)?;
    super::install::wait_at_work(stage)?;
    subject.remove(stage)
}

/// What the pest does, in a process of its own on the cluster's network, until it is killed.
///
/// # Errors
/// If nobody listens at the address.
pub fn pest(address: std::net::SocketAddr, case: &str) -> Result<()> {
    use std::io::{Read as _, Write as _};
    let noise: Vec<u8> = (0..65_536u32)
        .map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let mut open = Vec::new();
    loop {
        let mut stream = std::net::TcpStream::connect_timeout(&address, Duration::from_secs(5))
            .with_context(|| format!("nobody listens on {address}"))?;
        stream
            .set_read_timeout(Some(Duration::from_millis(500)))
            .context("cannot set a timeout")?;
        // The other side hangs up when it has heard enough: that is no failure of the pest.
        match case {
            "noise" => drop(stream.write_all(&noise)),
            "http" => drop(stream.write_all(b"POST / HTTP/1.1\r\nHost: agent\r\nContent-Length: 4294967295\r\n\r\n")),
            // A TLS record that promises a handshake of the greatest length and never ends.
            "flood" => drop(stream.write_all(&[22, 3, 1, 255, 255, 1, 0, 255, 255])),
            _ => {}
        }
        let mut bytes = [0u8; 256];
        drop(stream.read(&mut bytes));
        open.push(stream);
        if open.len() > 200 {
            open.clear();
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
