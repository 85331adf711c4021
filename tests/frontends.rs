//! What VMMs other than QEMU and cloud-hypervisor do, and guests other than Linux.

mod guests;
