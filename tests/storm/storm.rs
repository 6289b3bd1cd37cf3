// SPDX-License-Identifier: Apache-2.0
//! One life of a daemon after the other, and when each of them ends.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Sender};
use std::time::{Duration, Instant};

use quorum_blk::front_end::{FrontEndError, Options};

use crate::common::Random;
use crate::guest::{Figures, Guest, Observer};
use crate::model::Model;
use crate::site::{PATIENCE, SECTORS, Site};

/// Kills between two pauses in which everything in flight is waited for.
const KILLS_BETWEEN_PAUSES: usize = 20;
/// Most requests in flight on a queue.
const DEPTH_MAX: usize = 32;

/// What a storm is like.
#[derive(Clone, Copy, Debug)]
pub struct Weather {
    /// Of the front-end.
    pub options: Options,
    /// Milliseconds by which one replica is late with every answer.
    pub late: Option<u32>,
    /// Whether another one leaves and comes back, with what it held when it left.
    pub leaving: bool,
    /// Whether the guest is reset now and then, in the middle of everything.
    pub resets: bool,
    /// How many times the daemon is killed.
    pub kills: usize,
    /// Not more kills than fit into this time; a tenth of them at least.
    pub limit: Duration,
    pub seed: u64,
}

/// When a daemon is killed.
#[derive(Clone, Copy, Debug)]
enum End {
    /// Some time after its process was made: before it listens, or soon after.
    Start(Duration),
    /// Some time after the front-end sent it so many messages.
    Message(usize, Duration),
    /// Some time after the front-end has said all it has to say.
    Connected(Duration),
    /// After it has completed so many requests.
    Work(usize),
}

impl End {
    fn random(random: &mut Random) -> Self {
        let mut within = |micros| Duration::from_micros(random.below(micros) as u64);
        let (long, short, shorter) = (within(60_000), within(5_000), within(400));
        match random.below(10) {
            0 | 1 => Self::Start(long),
            2..=4 => Self::Message(1 + random.below(40), shorter),
            5 => Self::Connected(short),
            _ => Self::Work(1 + random.below(300)),
        }
    }
}

/// How often a daemon was killed at which time of its life.
#[derive(Clone, Copy, Debug, Default)]
pub struct Kills {
    pub before_it_listened: usize,
    pub during_negotiation: usize,
    pub serving: usize,
}

impl Kills {
    pub fn all(&self) -> usize {
        self.before_it_listened + self.during_negotiation + self.serving
    }
}

/// Kills the daemon when it is told to, from a thread of its own.
struct Killer<'a> {
    site: &'a Site,
    killing: &'a AtomicBool,
    /// It is asked to end so long before.
    warning: Option<Duration>,
}

impl Killer<'_> {
    /// Waits for the order, and then for so long.
    fn run(&self, orders: &mpsc::Receiver<Duration>) {
        // No order comes where the test has failed.
        if let Ok(delay) = orders.recv_timeout(3 * PATIENCE) {
            std::thread::sleep(delay);
        }
        self.killing.store(true, Ordering::SeqCst);
        if let Some(warning) = self.warning {
            self.site.ask_to_end();
            std::thread::sleep(warning);
        }
        self.site.kill();
    }
}

/// A disk, a guest, and what it knows.
pub struct Storm {
    weather: Weather,
    pub site: Site,
    guest: Option<Guest>,
    model: Model,
    random: Random,
    away: bool,
    pub kills: Kills,
    /// Ends after which no extent was dirty: what is written next changes the record first.
    pub clean_stops: usize,
    pub figures: Figures,
}

impl Storm {
    pub fn new(weather: Weather) -> Self {
        Self {
            weather,
            site: Site::new(weather.late),
            guest: None,
            model: Model::new(SECTORS),
            random: Random::new(weather.seed),
            away: false,
            kills: Kills::default(),
            clean_stops: 0,
            figures: Figures::default(),
        }
    }

    /// All of it.
    pub fn rage(&mut self) {
        let deadline = Instant::now() + self.weather.limit;
        while self.kills.all() < self.weather.kills {
            let enough = self.kills.all() >= self.weather.kills / 10;
            if enough && Instant::now() > deadline {
                break;
            }
            // Among the first writes after a clean stop, for which the record changes first.
            let soon = End::Work(1 + self.random.below(24));
            self.live_until(soon);
            for _ in 1..KILLS_BETWEEN_PAUSES {
                self.disturb();
                let end = End::random(&mut self.random);
                self.live_until(end);
            }
            self.pause();
        }
    }

    /// What happens beside the kills.
    fn disturb(&mut self) {
        if self.weather.leaving && self.random.below(6) == 0 {
            self.away = !self.away;
            self.site.set_away(self.away);
        }
        if self.weather.resets && self.random.below(8) == 0 {
            self.reset_guest();
        }
    }

    /// The guest is gone, with all it waited for.
    fn reset_guest(&mut self) {
        if let Some(guest) = self.guest.take() {
            self.figures = guest.figures;
            self.model.abandon();
        }
    }

    /// A daemon starts, is found by the front-end, serves, and is killed.
    fn live_until(&mut self, end: End) {
        self.site.launch();
        let warned = self.random.below(8) == 0;
        let warning = Duration::from_micros(self.random.below(15_000) as u64);
        let warning = warned.then_some(warning);
        let killing = AtomicBool::new(false);
        let (order, orders) = mpsc::channel();
        let connected = std::thread::scope(|scope| {
            let (site, killing) = (&self.site, &killing);
            let killer = Killer {
                site,
                killing,
                warning,
            };
            scope.spawn(move || killer.run(&orders));
            if let End::Start(delay) = end {
                let _ = order.send(delay);
            }
            let life = Life {
                site,
                killing,
                weather: &self.weather,
                order,
                end,
            };
            let found = life.connect(&mut self.guest, self.figures);
            if let (Found::Serving, Some(guest)) = (found, &mut self.guest) {
                life.serve(guest, &mut self.model, &mut self.random);
            }
            found
        });
        self.site.reap(warned);
        match connected {
            Found::Nobody => self.kills.before_it_listened += 1,
            Found::Dying => self.kills.during_negotiation += 1,
            Found::Serving => self.kills.serving += 1,
        }
        let Some(guest) = &mut self.guest else { return };
        guest.collect(&mut self.model);
        guest.note_kill();
        if self.random.below(2) == 0 {
            // While nobody serves.
            guest.fill(&mut self.model, &mut self.random, DEPTH_MAX);
        }
    }

    /// A daemon that is not killed before everything in flight is completed. What comes then: it
    /// is killed idle, or ends as it should.
    fn pause(&mut self) {
        self.serve_quietly();
        if self.random.below(2) == 0 {
            self.site.kill();
            self.site.reap(false);
            self.kills.serving += 1;
        } else {
            if !self.away {
                self.site.await_settled();
            }
            self.clean_stops += usize::from(self.site.stop());
        }
        self.guest().note_kill();
    }

    fn guest(&mut self) -> &mut Guest {
        self.guest.as_mut().expect("it was connected")
    }

    fn serve_quietly(&mut self) {
        self.site.launch();
        let killing = AtomicBool::new(false);
        let (order, _orders) = mpsc::channel();
        let life = Life {
            site: &self.site,
            killing: &killing,
            weather: &self.weather,
            order,
            end: End::Work(usize::MAX),
        };
        life.connect(&mut self.guest, self.figures);
        let guest = self.guest.as_mut().expect("nobody kills");
        guest.fill(&mut self.model, &mut self.random, DEPTH_MAX / 2);
        guest.drain(&mut self.model);
        self.figures = guest.figures;
    }

    /// After the last kill: everything comes to rest, all replicas are alike and hold what was
    /// acknowledged, and the record is in order. Returns what it says.
    pub fn calm(&mut self) -> String {
        if self.away {
            self.site.set_away(false);
            self.away = false;
        }
        self.site.hurry();
        self.serve_quietly();
        self.guest().stop();
        self.guest = None;
        self.site.await_healthy();
        let image = self.site.await_equal();
        self.model.check_image(&image);
        assert!(self.site.stop(), "an extent is dirty: {}", self.site.log());
        assert!(self.site.await_equal() == image, "it changed at the end");
        self.site.record()
    }
}

/// What became of a connection.
#[derive(Clone, Copy, Debug)]
enum Found {
    /// The daemon was killed before it listened.
    Nobody,
    /// The daemon was killed before everything was said.
    Dying,
    Serving,
}

/// The time of one daemon.
struct Life<'a> {
    site: &'a Site,
    killing: &'a AtomicBool,
    weather: &'a Weather,
    order: Sender<Duration>,
    end: End,
}

impl Life<'_> {
    fn is_ending(&self) -> bool {
        self.killing.load(Ordering::SeqCst)
    }

    /// Orders the kill at the right message.
    fn observer(&self) -> Observer {
        let End::Message(last, delay) = self.end else {
            return Box::new(|_| ());
        };
        let (order, mut count) = (self.order.clone(), 0);
        Box::new(move |_| {
            count += 1;
            if count == last {
                // Nobody takes it where the test has failed.
                let _ = order.send(delay);
            }
        })
    }

    /// The front-end tries until it has its back-end, or that is killed.
    fn connect(&self, guest: &mut Option<Guest>, figures: Figures) -> Found {
        let deadline = Instant::now() + PATIENCE;
        let socket = &self.site.socket;
        loop {
            let result = match guest {
                Some(guest) => guest.reconnect(socket, self.observer()),
                None => Guest::boot(socket, &self.weather.options, self.observer(), figures)
                    .map(|booted| *guest = Some(booted)),
            };
            let error = match result {
                Ok(()) => return Found::Serving,
                Err(error) => error,
            };
            let nobody = matches!(error, FrontEndError::Connect { .. });
            if self.is_ending() {
                return if nobody { Found::Nobody } else { Found::Dying };
            }
            assert!(nobody, "{error:?}: {}", self.site.log());
            assert!(Instant::now() < deadline, "{}", self.site.log());
            std::thread::sleep(Duration::from_micros(500));
        }
    }

    /// The guest works until the daemon is killed.
    fn serve(&self, guest: &mut Guest, model: &mut Model, random: &mut Random) {
        let deadline = Instant::now() + PATIENCE;
        let depth = 1 + random.below(DEPTH_MAX);
        let last = match self.end {
            End::Work(last) => last,
            End::Message(_, delay) | End::Connected(delay) => {
                // A message may be one too many.
                let _ = self.order.send(delay);
                usize::MAX
            }
            End::Start(_) => usize::MAX,
        };
        let mut completed = 0;
        while !self.is_ending() {
            guest.fill(model, random, depth);
            let some = guest.collect(model);
            completed += some;
            if completed >= last {
                let _ = self.order.send(Duration::ZERO);
            } else if some == 0 {
                std::thread::sleep(Duration::from_micros(50));
            }
            let late = Instant::now() >= deadline;
            assert!(!late, "{completed} of {last}: {guest:#?}");
        }
    }
}
