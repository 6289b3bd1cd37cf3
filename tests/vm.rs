// SPDX-License-Identifier: Apache-2.0
//! Real guests on a disk served by the real daemon: one test for each scenario of
//! `tests/vm/scenarios.py`, which tells what must hold. They need QEMU and a guest kernel
//! (`scripts/install-test-deps`) and root for loop devices and mounts; without those they fail,
//! they are never skipped. Leave them out with `cargo test -- --skip vm_`.

use std::path::Path;
use std::process::Command;

/// Runs one scenario; the driver lets others wait.
fn scenario(name: &str) {
    let driver = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vm/run.py");
    let output = Command::new("python3")
        .arg(driver)
        .args(["--daemon", env!("CARGO_BIN_EXE_quorum-blk")])
        .args(["--scenario", name])
        .env("CARGO_TARGET_DIR", target_folder())
        .output()
        .expect("python3 runs; scripts/install-test-deps installs it");
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// The target folder that holds the guest kernel: the one this test was built in.
fn target_folder() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
        .parent()
        .expect("cargo's folder for test files is in the target folder")
}

#[test]
fn vm_healthy_guest_leaves_identical_replicas() {
    scenario("healthy");
}

#[test]
fn vm_garbage_in_one_replica_is_outvoted_and_repaired() {
    scenario("garbage-one");
}

#[test]
fn vm_garbage_in_two_replicas_is_outvoted_sector_by_sector() {
    scenario("garbage-two");
}

#[test]
fn vm_read_errors_of_one_replica_do_not_reach_the_guest() {
    scenario("read-errors");
}

#[test]
fn vm_full_file_system_of_one_replica_does_not_reach_the_guest() {
    scenario("no-space");
}

#[test]
fn vm_truncated_replica_does_not_reach_the_guest() {
    scenario("truncated");
}

#[test]
fn vm_slow_replica_does_not_slow_the_guest() {
    scenario("slow");
}

#[test]
fn vm_file_that_returns_stale_is_brought_up_to_date() {
    scenario("stale-return");
}

#[test]
fn vm_hanging_replica_is_left_out_and_comes_back() {
    scenario("hang");
}

#[test]
fn vm_full_replica_is_left_behind_and_catches_up() {
    scenario("full");
}

#[test]
fn vm_failing_replica_is_left_behind_and_catches_up() {
    scenario("eio");
}

#[test]
fn vm_power_loss_leaves_every_synced_file_intact() {
    scenario("power-loss");
}

#[test]
fn vm_disk_grows_under_a_guest_that_writes() {
    scenario("grow");
}

#[test]
fn vm_firmware_boots_from_the_disk_and_qemu_reconnects() {
    scenario("firmware");
}

#[test]
fn vm_guest_migrates_to_another_daemon_and_may_be_called_back() {
    scenario("migrate");
}

#[test]
fn vm_guest_does_not_notice_that_the_daemon_is_killed() {
    scenario("kill-storm");
}
