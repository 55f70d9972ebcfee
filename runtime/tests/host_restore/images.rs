//! Takes memory out of CRIU's images and puts it into page stores, as if it had been copied before the dump.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use protocol::store_index::{StoreIndex, index_file, pages_file};

const PAGE: u64 = 4096;

/// Fields of a protobuf message that has varints, and messages as bytes.
fn fields(mut bytes: &[u8]) -> Vec<(u64, u64, Vec<u8>)> {
    let mut out = Vec::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes);
        match key & 7 {
            0 => out.push((key >> 3, varint(&mut bytes), Vec::new())),
            2 => {
                let len = usize::try_from(varint(&mut bytes)).unwrap();
                out.push((key >> 3, 0, bytes[..len].to_vec()));
                bytes = &bytes[len..];
            }
            other => panic!("wire type {other}"),
        }
    }
    out
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let (mut value, mut shift) = (0, 0);
    loop {
        let byte = bytes[0];
        *bytes = &bytes[1..];
        value |= u64::from(byte & 0x7f) << shift;
        shift += 7;
        if byte < 0x80 {
            return value;
        }
    }
}

fn put(out: &mut Vec<u8>, number: u64, mut value: u64) {
    out.push(u8::try_from(number << 3).unwrap());
    while value > 0x7f {
        out.push(u8::try_from(value & 0x7f).unwrap() | 0x80);
        value >>= 7;
    }
    out.push(u8::try_from(value).unwrap());
}

fn field(fields: &[(u64, u64, Vec<u8>)], number: u64) -> Option<u64> {
    fields.iter().find(|f| f.0 == number).map(|f| f.1)
}

/// The messages behind the two magic numbers of an image.
fn messages(path: &Path) -> Vec<Vec<u8>> {
    let bytes = fs::read(path).unwrap();
    let mut rest = &bytes[8..];
    let mut out = Vec::new();
    while !rest.is_empty() {
        let len = u32::from_le_bytes(rest[..4].try_into().unwrap()) as usize;
        out.push(rest[4..4 + len].to_vec());
        rest = &rest[4 + len..];
    }
    out
}

/// The mappings that CRIU restores lazily: `vma_entry_can_be_lazy`.
fn lazy_areas(mm: &Path) -> Vec<Range<u64>> {
    let (private, anonymous, locked, hugetlb) = (0x02, 0x20, 0x2000, 0x40000);
    let (vdso, vsyscall, vvar) = (1 << 3, 1 << 2, 1 << 12);
    let mm = messages(mm).remove(0);
    let vmas = fields(&mm).into_iter().filter(|f| f.0 == 14).map(|f| fields(&f.2));
    vmas.filter(|vma| {
        let (flags, status) = (field(vma, 6).unwrap(), field(vma, 7).unwrap());
        flags & (private | anonymous) == private | anonymous
            && flags & (locked | hugetlb) == 0
            && status & (vdso | vsyscall | vvar) == 0
    })
    .map(|vma| field(&vma, 1).unwrap()..field(&vma, 2).unwrap())
    .collect()
}

/// Moves all memory that can be lazy from the images into stores. Returns how many bytes each process has there.
pub(crate) fn to_stores(images: &Path, store: &Path) -> BTreeMap<u32, u64> {
    fs::create_dir_all(store).unwrap();
    let mut moved = BTreeMap::new();
    for entry in fs::read_dir(images).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let vpid = name.strip_prefix("mm-").and_then(|n| n.strip_suffix(".img"));
        let Some(vpid) = vpid.map(|n| n.parse::<u32>().unwrap()) else {
            continue;
        };
        moved.insert(vpid, process(images, store, vpid));
    }
    moved
}

fn process(images: &Path, store: &Path, vpid: u32) -> u64 {
    let areas = lazy_areas(&images.join(format!("mm-{vpid}.img")));
    let pagemap = images.join(format!("pagemap-{vpid}.img"));
    let magic = fs::read(&pagemap).unwrap()[..8].to_vec();
    let mut entries = messages(&pagemap);
    let head = entries.remove(0);
    let pages_path = images.join(format!("pages-{}.img", field(&fields(&head), 1).unwrap()));
    let pages = File::open(&pages_path).unwrap();
    let out = File::create(store.join(pages_file(vpid))).unwrap();
    let mut image = magic;
    let mut emit = |message: &[u8]| {
        image.extend_from_slice(&u32::try_from(message.len()).unwrap().to_le_bytes());
        image.extend_from_slice(message);
    };
    emit(&head);
    let (mut kept, mut runs, mut offset) = (Vec::new(), Vec::<Range<u64>>::new(), 0);
    for entry in entries {
        let entry = fields(&entry);
        let count = field(&entry, 5).or(field(&entry, 2)).unwrap();
        assert_eq!(field(&entry, 4).unwrap_or(4) & 4, 4, "a page that is not in the image");
        for page in 0..count {
            let at = field(&entry, 1).unwrap() + page * PAGE;
            let mut bytes = vec![0; 4096];
            pages.read_exact_at(&mut bytes, offset).unwrap();
            offset += PAGE;
            if areas.iter().any(|area| area.contains(&at)) {
                if bytes.iter().any(|b| *b != 0) {
                    out.write_all_at(&bytes, at).unwrap();
                    match runs.last_mut() {
                        Some(last) if last.end == at => last.end += PAGE,
                        _ => runs.push(at..at + PAGE),
                    }
                }
            } else {
                kept.extend_from_slice(&bytes);
                let mut message = Vec::new();
                for (number, value) in [(1, at), (2, 1), (4, 4), (5, 1)] {
                    put(&mut message, number, value);
                }
                emit(&message);
            }
        }
    }
    fs::write(&pagemap, image).unwrap();
    fs::write(&pages_path, kept).unwrap();
    let index = StoreIndex {
        page_size: 4096,
        hot: runs.iter().rev().take(3).cloned().collect(),
        areas,
        runs,
    };
    fs::write(store.join(index_file(vpid)), index.encode()).unwrap();
    index.bytes()
}
