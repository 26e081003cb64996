//! What goes wrong, and what visitors may see of it.

use std::{io::Write, process::ExitStatus, time::Duration};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, sleep_until},
};

use crate::{
    process::Process,
    proxy::Proxy,
    visit::Plan,
    world::{World, lock, set_age},
};

/// After the end of a fault the tunnel answers again within this time.
const BACK_WITHIN: Duration = Duration::from_secs(5);
/// A connection that was forgotten on the way is only noticed by asking: within this time.
const NOTICED_WITHIN: Duration = Duration::from_secs(30);
/// How long agents' connections live while there are faults: the agent moves after 6 s, and what a fault delays that for leaves
/// time for the requests in flight.
pub(crate) const AGE: &str = "20s";
/// A process that was killed is started again after this time at the latest.
const LONGEST_DOWNTIME: Duration = Duration::from_secs(2);
/// A process that was asked to end has done so within this time. The service and the agent promise ten seconds.
const ENDS_WITHIN: Duration = Duration::from_secs(11);
/// Of two agents one has ended within this time: what a network that is down delays, and one ping interval.
const ONE_IS_LEFT_WITHIN: Duration = Duration::from_secs(60);
/// With this code an agent ends because another one has taken its tunnel over.
const TAKEN_OVER: i32 = 5;
/// How often processes are looked at that are to end.
const POLL: Duration = Duration::from_millis(20);
/// How many requests fill the agent, and how long each stays.
const FILLING: usize = 300;
const FILLING_MS: u64 = 2000;

/// One way in which things go wrong.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Fault {
    KillAgent,
    KillService,
    KillLocalService,
    EndAgent,
    EndService,
    StopAgent,
    StopService,
    StopLocalService,
    ResetConnections,
    CloseToAgent,
    CloseToService,
    RefuseConnections,
    HoldBytes,
    SwallowBytes,
    DropPackets,
    ForgetConnections,
    DelayBytes,
    ThrottleBytes,
    ReorderMessages,
    FillAgent,
    SecondAgent,
    StallTables,
    FillDisk,
}

/// What a fault is about. Two at once are about two things.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Place {
    Agent,
    Service,
    LocalService,
    Network,
}

impl Fault {
    pub(crate) const ALL: [Self; 23] = [
        Self::KillAgent,
        Self::KillService,
        Self::KillLocalService,
        Self::EndAgent,
        Self::EndService,
        Self::StopAgent,
        Self::StopService,
        Self::StopLocalService,
        Self::ResetConnections,
        Self::CloseToAgent,
        Self::CloseToService,
        Self::RefuseConnections,
        Self::HoldBytes,
        Self::SwallowBytes,
        Self::DropPackets,
        Self::ForgetConnections,
        Self::DelayBytes,
        Self::ThrottleBytes,
        Self::ReorderMessages,
        Self::FillAgent,
        Self::SecondAgent,
        Self::StallTables,
        Self::FillDisk,
    ];

    /// Whether it can be done here.
    pub(crate) fn is_possible(self, world: &World) -> bool {
        match self {
            Self::DropPackets => world.can_drop_packets,
            Self::FillDisk => world.can_fill_disk,
            _ => true,
        }
    }

    pub(crate) fn place(self) -> Place {
        match self {
            Self::KillAgent
            | Self::EndAgent
            | Self::StopAgent
            | Self::FillAgent
            | Self::SecondAgent => Place::Agent,
            Self::KillService
            | Self::EndService
            | Self::StopService
            | Self::StallTables
            | Self::FillDisk => Place::Service,
            Self::KillLocalService | Self::StopLocalService => Place::LocalService,
            Self::ResetConnections
            | Self::CloseToAgent
            | Self::CloseToService
            | Self::RefuseConnections
            | Self::HoldBytes
            | Self::SwallowBytes
            | Self::DropPackets
            | Self::ForgetConnections
            | Self::DelayBytes
            | Self::ThrottleBytes
            | Self::ReorderMessages => Place::Network,
        }
    }

    /// The errors that visitors may get of it.
    pub(crate) fn codes(self) -> &'static [&'static str] {
        match self {
            Self::KillAgent
            | Self::ResetConnections
            | Self::CloseToAgent
            | Self::CloseToService
            | Self::RefuseConnections
            | Self::KillService
            | Self::EndService => &["agent_lost", "tunnel_offline"],
            // What waited for the service comes to its time limit, or all at once.
            Self::StopService => &[
                "agent_lost",
                "tunnel_offline",
                "agent_busy",
                "local_timeout",
            ],
            // Requests go on to the agent that takes over, but for those that do not fit into one message.
            Self::SecondAgent => &["tunnel_offline"],
            // An agent that is asked to end takes no more requests while it finishes those that it has. What is sent to it when it
            // has closed the connection crosses its close frame and is lost.
            Self::EndAgent => &["agent_lost", "tunnel_offline", "agent_busy"],
            // The agent cannot move in time, lookups fail, and visitors who waited for one come all at once.
            Self::StallTables | Self::FillDisk => &[
                "agent_lost",
                "tunnel_offline",
                "internal_error",
                "agent_busy",
            ],
            // Messages for the agent wait, until there are too many. An upload that has begun is not said to be refused then, because
            // the local service may have acted on it. And an agent that was stopped finds that its local service took too long.
            Self::StopAgent
            | Self::HoldBytes
            | Self::SwallowBytes
            | Self::DropPackets
            | Self::ForgetConnections => &[
                "agent_lost",
                "tunnel_offline",
                "agent_busy",
                "local_timeout",
            ],
            Self::KillLocalService => &["local_unreachable"],
            Self::StopLocalService => &[
                "local_unreachable",
                "local_timeout",
                "agent_busy",
                "agent_lost",
            ],
            Self::DelayBytes | Self::ReorderMessages => &[],
            // A transfer may take longer than the ten seconds that connections live.
            Self::ThrottleBytes => &["agent_busy", "agent_lost", "local_timeout"],
            Self::FillAgent => &["agent_busy"],
        }
    }

    /// Whether connections of visitors may end before their answers do.
    pub(crate) fn breaks(self) -> bool {
        !matches!(
            self,
            Self::EndAgent
                | Self::SecondAgent
                | Self::DelayBytes
                | Self::ReorderMessages
                | Self::FillAgent
        )
    }

    /// When the tunnel must answer again, counted from its end.
    pub(crate) fn back_within(self) -> Duration {
        if self == Self::ForgetConnections {
            NOTICED_WITHIN + BACK_WITHIN
        } else {
            BACK_WITHIN
        }
    }

    /// Lets it happen for `time`, and says what went wrong that visitors did not see.
    pub(crate) async fn run(
        self,
        world: &World,
        time: Duration,
        random: &mut StdRng,
    ) -> std::io::Result<Option<String>> {
        match self {
            Self::EndAgent | Self::EndService => return end(world, self.place(), time).await,
            Self::SecondAgent => return second_agent(world, time).await,
            Self::KillAgent | Self::KillService | Self::KillLocalService => {
                let age = (self == Self::KillService)
                    .then(|| [AGE, AGE, "2h"][random.random_range(0..3)]);
                kill(world, self.place(), time.min(LONGEST_DOWNTIME), age).await?;
            }
            Self::StopAgent | Self::StopService | Self::StopLocalService => {
                stop(world, self.place(), time).await?;
            }
            Self::FillAgent => fill(world).await?,
            Self::StallTables => stall_tables(world, time).await?,
            Self::FillDisk => fill_disk(world, time).await?,
            Self::DropPackets => {
                world.drop_packets(true)?;
                sleep(time).await;
                world.drop_packets(false)?;
            }
            Self::ResetConnections
            | Self::CloseToAgent
            | Self::CloseToService
            | Self::RefuseConnections
            | Self::HoldBytes
            | Self::SwallowBytes
            | Self::ForgetConnections
            | Self::DelayBytes
            | Self::ThrottleBytes
            | Self::ReorderMessages => self.disturb(&world.network, time, random).await,
        }
        Ok(None)
    }

    /// Lets a fault of the proxy between agent and service happen.
    async fn disturb(self, network: &Proxy, time: Duration, random: &mut StdRng) {
        let rate = random.random_range(100_000..1_000_000);
        let delay = Duration::from_millis(random.random_range(20..300));
        network.change(|mode, next| match self {
            Self::ResetConnections => mode.reset_before = next,
            Self::CloseToAgent => mode.close_to_agent_before = next,
            Self::CloseToService => mode.close_to_service_before = next,
            Self::RefuseConnections => (mode.refuses, mode.reset_before) = (true, next),
            Self::HoldBytes => mode.holds = true,
            Self::SwallowBytes => mode.swallows = true,
            Self::ForgetConnections => mode.forget_before = next,
            Self::DelayBytes => mode.delay = delay,
            Self::ThrottleBytes => mode.bytes_per_second = Some(rate),
            Self::ReorderMessages => mode.reorders = true,
            _ => unreachable!("{self:?} is not a fault of the proxy"),
        });
        if self.lasts() {
            sleep(time).await;
        }
        network.change(|mode, next| {
            // What was swallowed cannot come any more.
            mode.reset_before = if mode.swallows {
                next
            } else {
                mode.reset_before
            };
            (mode.refuses, mode.holds, mode.swallows) = (false, false, false);
            (mode.reorders, mode.delay, mode.bytes_per_second) = (false, Duration::ZERO, None);
        });
    }

    fn lasts(self) -> bool {
        !matches!(
            self,
            Self::ResetConnections
                | Self::CloseToAgent
                | Self::CloseToService
                | Self::ForgetConnections
        )
    }
}

fn process(world: &World, place: Place) -> &std::sync::Mutex<Process> {
    match place {
        Place::Agent | Place::Network => &world.agent,
        Place::Service => &world.service,
        Place::LocalService => &world.local_service,
    }
}

async fn kill(
    world: &World,
    place: Place,
    time: Duration,
    age: Option<&str>,
) -> std::io::Result<()> {
    lock(process(world, place)).kill()?;
    sleep(time).await;
    lock(process(world, place)).restart(|arguments| {
        if age.is_some() {
            set_age(arguments, age);
        }
    })
}

async fn stop(world: &World, place: Place, time: Duration) -> std::io::Result<()> {
    lock(process(world, place)).signal("STOP")?;
    sleep(time).await;
    lock(process(world, place)).signal("CONT")
}

/// More requests at once than the agent takes.
async fn fill(world: &World) -> std::io::Result<()> {
    let mut filling = JoinSet::new();
    for _ in 0..FILLING {
        let mut plan = Plan::get("filler", world.load.number(), 100);
        plan.wish.wait_ms = FILLING_MS;
        let load = world.load.clone();
        filling.spawn(async move { load.make(vec![plan]).await });
    }
    while filling.join_next().await.is_some() {}
    Ok(())
}

/// Asks a process to end, and starts it again.
async fn end(world: &World, place: Place, time: Duration) -> std::io::Result<Option<String>> {
    let (name, asked) = (lock(process(world, place)).name, Instant::now());
    lock(process(world, place)).signal("TERM")?;
    let status = loop {
        if let Some(status) = lock(process(world, place)).ended() {
            break Some(status);
        }
        if asked.elapsed() > ENDS_WITHIN {
            break None;
        }
        sleep(POLL).await;
    };
    let problem = match status {
        Some(status) if status.success() => None,
        Some(status) => Some(format!("{name} was asked to end: {status}")),
        None => Some(format!("{name} did not end within {ENDS_WITHIN:?}")),
    };
    lock(process(world, place)).kill()?;
    sleep(time.min(LONGEST_DOWNTIME)).await;
    lock(process(world, place)).restart(|_| {})?;
    Ok(problem)
}

/// Another agent asks for the same tunnel. One of both ends, and the other is the agent from now on.
async fn second_agent(world: &World, time: Duration) -> std::io::Result<Option<String>> {
    let mut second = lock(&world.agent).twin()?;
    sleep(time).await;
    let since = Instant::now();
    let (first_status, second_status) = loop {
        let ended = (lock(&world.agent).ended(), second.ended());
        if ended != (None, None) || since.elapsed() > ONE_IS_LEFT_WITHIN {
            break ended;
        }
        sleep(POLL).await;
    };
    if first_status.is_some() {
        std::mem::swap(&mut *lock(&world.agent), &mut second);
    }
    let is_taken_over =
        |status: Option<ExitStatus>| status.and_then(|status| status.code()) == Some(TAKEN_OVER);
    Ok(match (first_status, second_status) {
        (Some(first), Some(other)) => Some(format!("both agents ended: {first}, {other}")),
        (None, None) => Some("neither of two agents has ended".to_owned()),
        (one, other) if is_taken_over(one.or(other)) => None,
        (one, other) => Some(format!("one of two agents ended: {:?}", one.or(other))),
    })
}

/// The disk with the database is full.
async fn fill_disk(world: &World, time: Duration) -> std::io::Result<()> {
    let path = world.data().join("filler");
    let mut filler = std::fs::File::create(&path)?;
    for block in [64 * 1024, 4096] {
        let bytes = vec![0; block];
        while filler.write_all(&bytes).is_ok() {}
    }
    sleep(time).await;
    std::fs::remove_file(path)
}

/// Another process writes to the database and does not come to an end.
async fn stall_tables(world: &World, time: Duration) -> std::io::Result<()> {
    let database = rusqlite::Connection::open(world.data().join("tunnel.db"))
        .map_err(std::io::Error::other)?;
    database
        .busy_timeout(Duration::from_secs(10))
        .and_then(|()| database.execute_batch("BEGIN IMMEDIATE"))
        .map_err(std::io::Error::other)?;
    sleep(time).await;
    database
        .execute_batch("ROLLBACK")
        .map_err(std::io::Error::other)
}

/// A time during which something was wrong.
#[derive(Clone, Debug)]
pub(crate) struct Spell {
    pub(crate) faults: Vec<Fault>,
    /// What went wrong that visitors did not see.
    pub(crate) problems: Vec<String>,
    pub(crate) began: Instant,
    pub(crate) ended: Instant,
    /// How long after its end a request was answered; none if none was.
    pub(crate) back_after: Option<Duration>,
    /// From here on nothing may be wrong any more.
    pub(crate) over: Instant,
}

/// What was under way at the end of a fault may still be ending for this long.
const SETTLING: Duration = Duration::from_secs(1);

impl Spell {
    /// Lets faults happen at once, and waits until the tunnel answers again.
    pub(crate) async fn run(
        faults: &[Fault],
        world: &World,
        time: Duration,
        random: &mut StdRng,
    ) -> anyhow::Result<Self> {
        let began = Instant::now();
        let mut other = StdRng::seed_from_u64(random.random());
        let (first, second) = tokio::join!(
            async {
                if let Some(fault) = faults.first() {
                    fault.run(world, time, random).await
                } else {
                    Ok(None)
                }
            },
            async {
                if let Some(fault) = faults.get(1) {
                    fault.run(world, time.mul_f64(0.7), &mut other).await
                } else {
                    Ok(None)
                }
            },
        );
        let problems = first?.into_iter().chain(second?).collect();
        let ended = Instant::now();
        let back_after = world.until_it_answers(Duration::from_secs(90)).await;
        // What was forgotten on the way may be noticed later than the tunnel is back, because the agent moves to other connections.
        let settled = Instant::now() + SETTLING;
        let over = if faults.contains(&Fault::ForgetConnections) {
            settled.max(began + NOTICED_WITHIN + SETTLING)
        } else {
            settled
        };
        sleep_until(settled).await;
        Ok(Self {
            faults: faults.to_vec(),
            problems,
            began,
            ended,
            back_after,
            over,
        })
    }

    pub(crate) fn back_within(&self) -> Duration {
        self.faults
            .iter()
            .map(|fault| fault.back_within())
            .max()
            .unwrap_or(BACK_WITHIN)
    }

    pub(crate) fn allows(&self, code: &str) -> bool {
        self.faults
            .iter()
            .any(|fault| fault.codes().contains(&code))
    }

    pub(crate) fn breaks(&self) -> bool {
        self.faults.iter().any(|fault| fault.breaks())
    }
}
