// SPDX-License-Identifier: Apache-2.0
//! What the lanes of one disk agree on: membership, order, unresolved sectors, flush runs.

use super::flush_gate::FlushGate;
use super::membership::Membership;
use super::order::Order;
use super::policy::{Geometry, Policy, PolicyError};
use super::unresolved::Unresolved;

/// Shared by all lanes of a disk; small, and cheap to read.
pub struct Shared {
    /// The shape of the disk.
    pub geometry: Geometry,
    /// How it decides.
    pub policy: Policy,
    /// Who is current where.
    pub membership: Membership,
    /// Range locks.
    pub order: Order,
    /// The set U.
    pub unresolved: Unresolved,
    /// Flush runs.
    pub flushes: FlushGate,
    /// A rule that this build breaks on purpose, so that a test can show that it is noticed.
    #[cfg(test)]
    pub mutation: Option<super::mutation::Mutation>,
}

impl Shared {
    /// The shared part of a disk with every replica current everywhere.
    ///
    /// # Errors
    /// If the policy contradicts itself.
    pub fn new(geometry: Geometry, policy: Policy) -> Result<Self, PolicyError> {
        policy.validate()?;
        Ok(Self {
            membership: Membership::new(policy.replicas, policy.threshold, geometry.extents()),
            order: Order::new(geometry.extent_shift()),
            unresolved: Unresolved::new(),
            flushes: FlushGate::default(),
            geometry,
            policy,
            #[cfg(test)]
            mutation: None,
        })
    }
}
