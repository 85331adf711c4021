//! The benchmark: `cargo bench` prints what a chain costs in the ring, what a frame costs the
//! daemon through a TAP and through AF_XDP, and what TCP reaches in a real guest, each beside its
//! peer or a bare loop in the same run; what the sandbox, and the rules and filters for a guest cost,
//! what a flooding guest costs its neighbours, how exactly limits are kept, and what settings do.
//! `cargo bench -- ring` (or `tap`, `af_xdp`, `sandbox`, `policy`, `filter`, `fairness`, `limits`,
//! `guest`, `tuning`) runs a part.
//!
//! Judge by ratios within one run. "ns" is on-CPU time of all threads, kernel work in their system
//! calls included; the daemon or loop measured has processor 1, everything else processor 0.

#[allow(dead_code, unused_imports, unused_macros)]
#[path = "../support/mod.rs"]
mod support;

mod af_xdp;
mod fairness;
mod guest;
mod instructions;
mod limits;
mod measure;
mod options;
mod peers;
mod ring;
mod tap;
mod tuning;

fn main() {
    let words: Vec<String> = std::env::args().collect();
    if let [_, counted, name] = &words[..]
        && counted == "--counted"
    {
        instructions::counted(name);
        return;
    }
    if let [_, mode, socket, tap] = &words[..] {
        match &**mode {
            "--plain-backend" => return peers::serve_plain(socket.as_ref(), tap).unwrap(),
            "--vhost-net" => return peers::serve_vhost_net(socket.as_ref(), tap).unwrap(),
            _ => {}
        }
    }
    if words.iter().any(|word| word == "count") {
        return peers::count();
    }
    // cargo passes --bench.
    let wanted: Vec<String> =
        std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let parts: [(&str, fn()); 12] = [
        ("ring", ring::run),
        ("tap", tap::run),
        ("af_xdp", af_xdp::run),
        ("sandbox", options::sandbox),
        ("policy", options::policy),
        ("filter", options::filter),
        ("fairness", fairness::run),
        ("limits", limits::run),
        ("guest", guest::run),
        ("tuning", tuning::run),
        ("peers", peers::run),
        ("instructions", instructions::run),
    ];
    for (name, run) in parts {
        if wanted.is_empty() || wanted.iter().any(|word| word == name) {
            // Each in a thread of its own: it may move into a network namespace.
            std::thread::spawn(run).join().unwrap();
        }
    }
}
