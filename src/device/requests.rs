//! The dispatch of requests, and the refusals of those that are not carried out.

use std::sync::Arc;

use log::{debug, info, warn};
use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures as ProtocolFeatures};

use super::{Answer, Device, Refusal, refused};
use crate::features::{Negotiated, protocol_features};
use crate::guest::memory::MAX_SLOTS;
use crate::net_config::{MIN_MTU, NetConfig};
use crate::protocol::{Message, Reply, Request};

/// Returns the protocol feature that a request requires, if any.
fn protocol_feature(code: FrontendReq) -> Option<ProtocolFeatures> {
    Some(match code {
        FrontendReq::GET_QUEUE_NUM => ProtocolFeatures::MQ,
        FrontendReq::ADD_MEM_REG | FrontendReq::REM_MEM_REG | FrontendReq::GET_MAX_MEM_SLOTS => {
            ProtocolFeatures::CONFIGURE_MEM_SLOTS
        }
        FrontendReq::NET_SET_MTU => ProtocolFeatures::MTU,
        FrontendReq::SET_BACKEND_REQ_FD => ProtocolFeatures::BACKEND_REQ,
        FrontendReq::GET_CONFIG => ProtocolFeatures::CONFIG,
        FrontendReq::RESET_DEVICE => ProtocolFeatures::RESET_DEVICE,
        FrontendReq::SET_STATUS | FrontendReq::GET_STATUS => ProtocolFeatures::STATUS,
        FrontendReq::SET_LOG_BASE => ProtocolFeatures::LOG_SHMFD,
        FrontendReq::GET_INFLIGHT_FD | FrontendReq::SET_INFLIGHT_FD => {
            ProtocolFeatures::INFLIGHT_SHMFD
        }
        FrontendReq::SET_DEVICE_STATE_FD | FrontendReq::CHECK_DEVICE_STATE => {
            ProtocolFeatures::DEVICE_STATE
        }
        FrontendReq::SEND_RARP => ProtocolFeatures::RARP,
        _ => return None,
    })
}

/// Returns whether a request has a reply of its own, which cannot express a refusal.
fn demands_answer(code: FrontendReq) -> bool {
    matches!(
        code,
        FrontendReq::GET_QUEUE_NUM
            | FrontendReq::GET_MAX_MEM_SLOTS
            | FrontendReq::GET_VRING_BASE
            | FrontendReq::GET_CONFIG
            | FrontendReq::GET_STATUS
            | FrontendReq::SET_LOG_BASE
            | FrontendReq::GET_INFLIGHT_FD
            | FrontendReq::SET_DEVICE_STATE_FD
            | FrontendReq::CHECK_DEVICE_STATE
            | FrontendReq::CREATE_CRYPTO_SESSION
            | FrontendReq::POSTCOPY_ADVISE
            | FrontendReq::POSTCOPY_END
            | FrontendReq::GET_SHARED_OBJECT
            | FrontendReq::GET_SHMEM_CONFIG
    )
}

impl Device {
    /// Carries out a request.
    ///
    /// # Errors
    /// A [`Refusal`]; the device keeps the state that it had.
    pub fn handle(&mut self, message: Message) -> Result<Option<Reply>, Refusal> {
        let Message { request, code, .. } = message;
        debug!("{}: {code:?}", self.name);
        let handled = self.check_descriptors(&request).and_then(|()| {
            let handled = self.check_negotiated(code).and_then(|()| self.carry_out(request));
            self.count_descriptors();
            handled
        });
        handled.map_err(|refusal| match refusal {
            Refusal::Refused(why) if demands_answer(code) => Refusal::Unanswerable(why),
            refusal => refusal,
        })
    }

    /// Refuses a request whose protocol feature was not negotiated.
    fn check_negotiated(&self, code: FrontendReq) -> Result<(), Refusal> {
        let negotiated = self.frontend.protocol_features.unwrap_or(ProtocolFeatures::empty());
        match protocol_feature(code) {
            Some(feature) if !negotiated.contains(feature) => {
                refused(format!("its protocol feature {feature:?} was not negotiated"))
            }
            _ => Ok(()),
        }
    }

    fn carry_out(&mut self, request: Request) -> Answer {
        let number = |value: u64| Ok(Some(Reply::U64(value)));
        match request {
            Request::GetFeatures => number(self.offer.bits()),
            Request::SetFeatures(bits) => self.set_features(bits),
            Request::SetOwner => Ok(None),
            Request::ResetOwner => self.disable_all(),
            Request::GetProtocolFeatures => number(protocol_features().bits()),
            Request::SetProtocolFeatures(bits) => self.set_protocol_features(bits),
            // cloud-hypervisor compares this with its number of rings, QEMU with its queue pairs. The number of
            // rings satisfies both, and requests for rings beyond it are refused. crosvm creates this number of
            // rings, and its guest uses the last one as the control virtqueue.
            Request::GetQueueNum => number(self.frontend.rings.len() as u64),
            Request::SetMemTable(regions) => {
                self.replace_memory(self.frontend.memory.replaced(regions)?)
            }
            Request::AddMemReg(region, file) => {
                self.replace_memory(self.frontend.memory.with(region, file)?)
            }
            Request::RemMemReg(region) => {
                self.replace_memory(self.frontend.memory.without(region)?)
            }
            Request::GetMaxMemSlots => number(MAX_SLOTS as u64),
            Request::SetVringNum { index, size } => self.set_vring_num(index, size),
            Request::SetVringBase { index, base } => self.set_vring_base(index, base),
            Request::SetVringAddr { index, addresses } => self.set_vring_addr(index, addresses),
            Request::GetVringBase { index } => self.stop_ring(index),
            Request::SetVringKick { index, file } => self.set_vring_kick(index, file),
            Request::SetVringCall { index, file } => self.set_vring_call(index, file),
            Request::SetVringErr { index, file } => self.set_vring_err(index, file),
            Request::SetVringEnable { index, enable } => self.set_vring_enable(index, enable),
            Request::NetSetMtu(mtu) => self.set_mtu(mtu),
            Request::SetBackendReqFd(file) => {
                self.frontend.backend_requests = Some(Arc::new(file));
                Ok(None)
            }
            Request::GetConfig { offset, size, flags } => self.config(offset, size, flags),
            Request::SetConfig => refused("the configuration space is read-only"),
            Request::ResetDevice => {
                self.frontend.features = None;
                self.frontend.status = 0;
                self.disable_all()
            }
            Request::SetStatus(status) => self.set_status(status),
            Request::GetStatus => number(self.frontend.status.into()),
            Request::SetLogBase { size, offset, file } => {
                self.set_log(file, offset, size)?;
                Ok(Some(Reply::Log { size, offset }))
            }
            Request::GetInflightFd { rings, size } => self.make_inflight(rings, size).map(Some),
            Request::SetInflightFd { length, offset, rings, size, file } => {
                self.set_inflight(file, offset, length, (rings, size))
            }
            Request::SetDeviceStateFd { load, file } => self.transfer_state(load, file).map(Some),
            Request::CheckDeviceState => self.check_state().map(Some),
            Request::SendRarp(address) => self.announce(address),
            Request::Unsupported(_) => refused("its protocol feature was not offered"),
        }
    }

    fn set_features(&mut self, bits: u64) -> Answer {
        let negotiated = match self.offer.accept(bits) {
            Ok(negotiated) => negotiated,
            Err(error) => return refused(error.to_string()),
        };
        let running = self.frontend.rings.iter().any(|ring| ring.is_running() && !ring.is_idle());
        let same = |before: &Negotiated| before.is_same_but_for_the_log(&negotiated);
        if !self.frontend.features.as_ref().is_some_and(same) {
            if running {
                return refused("the features changed while rings run");
            }
            self.stop_all();
        }
        let before = self.frontend.features.replace(negotiated);
        if before != Some(negotiated) {
            info!("{}: driver negotiated features={bits:#x}", self.name);
        }
        if before.is_some_and(|before| before.logs()) != negotiated.logs()
            && let Err(refusal) = self.log_memory()
        {
            self.frontend.features = before;
            return Err(refusal);
        }
        Ok(None)
    }

    fn set_protocol_features(&mut self, bits: u64) -> Answer {
        let surplus = bits & !protocol_features().bits();
        if surplus != 0 {
            return refused(format!("protocol feature bits {surplus:#x} were not offered"));
        }
        self.frontend.protocol_features = Some(ProtocolFeatures::from_bits_truncate(bits));
        Ok(None)
    }

    /// Sets the MTU of the configuration space (NET_SET_MTU).
    fn set_mtu(&mut self, mtu: u64) -> Answer {
        let most = self.largest_mtu;
        match u16::try_from(mtu) {
            Ok(mtu) if (MIN_MTU..=most).contains(&mtu) => self.frontend.mtu = Some(mtu),
            _ => {
                return refused(format!(
                    "cannot set MTU {mtu}: the port carries {MIN_MTU} to {most}; change the \
                     VMM's host_mtu="
                ));
            }
        }
        self.restart_all();
        Ok(None)
    }

    /// Reads the configuration space (GET_CONFIG).
    fn config(&self, offset: u32, size: u32, flags: u32) -> Answer {
        let config = NetConfig { mtu: self.mtu(), ..self.config };
        let bytes = config.read(offset, size).unwrap_or_else(|| {
            warn!(
                "{}: read outside the configuration space offset={offset} bytes={size}; the frontend gets an \
                 error",
                self.name
            );
            Vec::new()
        });
        Ok(Some(Reply::Config { offset, flags, bytes }))
    }

    /// Stores the driver's device status (SET_STATUS); 0 is a reset, and stops all rings.
    fn set_status(&mut self, status: u64) -> Answer {
        let Ok(status) = u8::try_from(status) else {
            return refused(format!("device status {status:#x} has more than 8 bits"));
        };
        self.frontend.status = status;
        if status == 0 {
            self.stop_all();
        }
        Ok(None)
    }
}
