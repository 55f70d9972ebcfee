//! Memory and mappings.

use std::collections::BTreeSet;

use crds::Reason;

use super::descriptors::switched;
use super::{Area, Findings};
use crate::inventory::Inventory;
use crate::inventory::mappings::MappingKind;

pub(super) fn judge(inventory: &Inventory, checkpoint_limit_bytes: u64, findings: &mut Findings) {
    let mut system_v: BTreeSet<&str> = BTreeSet::new();
    for (container, process) in inventory.moved() {
        let name = Some(container.name.as_str());
        let label = process.label();
        let mut huge = process.memory.huge > 0;
        for mapping in &process.mappings {
            match mapping.kind {
                MappingKind::Huge => huge = true,
                MappingKind::SystemV => {
                    system_v.insert(&container.name);
                }
                MappingKind::Device => findings.refuse(
                    Area::Devices,
                    name,
                    Reason::DeviceNotSupported,
                    format!("{label} has the device {} mapped", mapping.name),
                ),
                MappingKind::File => {
                    if let Some(volume) = switched(&mapping.name, &inventory.spec) {
                        findings.refuse(
                            Area::Memory,
                            name,
                            Reason::DescriptorNotSupported,
                            format!(
                                "{label} has {} of volume {volume} mapped, a path that exists on the source node only",
                                mapping.name
                            ),
                        );
                    }
                }
                // Carried as a deleted file.
                MappingKind::DeletedFile => {}
                // Its descriptor is named already where it is still open.
                MappingKind::Other if mapping.name.contains("io_uring") => findings.refuse(
                    Area::Memory,
                    name,
                    Reason::IoUringNotSupported,
                    format!("{label} has the rings of an io_uring mapped"),
                ),
                MappingKind::Other => findings.refuse(
                    Area::Memory,
                    name,
                    Reason::Unknown,
                    format!(
                        "{label} has {} mapped, of which it is not known how to carry it",
                        mapping.name
                    ),
                ),
            }
        }
        if huge {
            findings.refuse(
                Area::Memory,
                name,
                Reason::HugetlbNotSupported,
                format!("{label} has memory of huge pages"),
            );
        }
    }
    // All containers share the pod's System V objects; they are restored once, with the first container.
    if system_v.len() > 1 || (!system_v.is_empty() && inventory.containers.len() > 1) {
        let names: Vec<&str> = system_v.into_iter().collect();
        findings.refuse(
            Area::Ipc,
            None,
            Reason::SharedMemoryNotSupported,
            format!(
                "System V shared memory is attached in {} of a pod of several containers",
                names.join(" and ")
            ),
        );
    }
    let memory = inventory.memory_bytes();
    if memory > checkpoint_limit_bytes {
        findings.refuse(
            Area::Memory,
            None,
            Reason::NotEnoughMemory,
            format!(
                "the pod's memory is {} MiB and this node has {} MiB for checkpoints",
                memory >> 20,
                checkpoint_limit_bytes >> 20
            ),
        );
    }
}
