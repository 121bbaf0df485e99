//! One proven connection to a member of etcd at a time, shared by the calls and the watch.
//!
//! Not a balancer: while a member serves, it is kept; when it fails, the next one is tried. Invariant: a
//! connection is handed out only after a linearizable read went through it, so a member that is cut off from
//! the others, stopped, or of another version gets no write.

use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::sync::{Mutex, watch};
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use tonic::client::Grpc;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Channel;
use tonic::{Code, Request, Streaming};
use tonic_prost::ProstCodec;

use super::access::{Credentials, Endpoint, EtcdOptions, Login, Tls};
use super::proto::{self, AuthenticateRequest, AuthenticateResponse, RangeRequest, RangeResponse};
use super::trouble::{Then, Trouble};

/// How long a member may take for the connection, the login and the first read, each.
const CONNECT: Duration = Duration::from_secs(2);
/// How long a member may take for a call. etcd itself gives up after 7 s.
const CALL: Duration = Duration::from_secs(5);
/// A connection that carries the watch is asked so often whether it lives, and lost after so long without an
/// answer. etcd refuses clients that ask more often than every 5 s (`--grpc-keepalive-min-time`).
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(5));
/// The longest answer: a list of 100,000 leases.
const MOST_BYTES: usize = 64 << 20;

/// The way to etcd.
pub(super) struct Link {
    pub(super) options: EtcdOptions,
    state: Mutex<State>,
    /// Counts the connections lost, so that the watch leaves a connection that a call found dead.
    lost: watch::Sender<u64>,
}

struct State {
    /// The endpoint to try next.
    next: usize,
    live: Option<Live>,
    made: u64,
    /// The cluster that was connected to last; all endpoints were of that one, as far as they answered.
    cluster: Option<u64>,
}

/// A connection that served a moment ago.
#[derive(Clone)]
pub(super) struct Live {
    grpc: Grpc<Channel>,
    pub(super) endpoint: Endpoint,
    token: Option<MetadataValue<Ascii>>,
    /// Tells it from the connections before and after.
    pub(super) number: u64,
    /// The cluster of etcd that the member is of.
    cluster: u64,
}

impl Link {
    pub(super) fn new(options: EtcdOptions) -> Arc<Self> {
        let state = State { next: 0, live: None, made: 0, cluster: None };
        Arc::new(Self { options, state: Mutex::new(state), lost: watch::Sender::new(0) })
    }

    /// Returns the connection, or makes one: to each member in turn until one serves.
    pub(super) async fn live(&self) -> Result<Live, Trouble> {
        let mut state = self.state.lock().await;
        if let Some(live) = &state.live {
            return Ok(live.clone());
        }
        let credentials = self.options.credentials().map_err(|error| Trouble::tell(error.to_string()))?;
        let mut causes: Vec<String> = Vec::new();
        for _ in &self.options.endpoints {
            let endpoint = self.options.endpoints[state.next].clone();
            // Before the attempt: who gives up waiting for it does not begin with the same member again.
            state.next = (state.next + 1) % self.options.endpoints.len();
            let began = Instant::now();
            match self.connect(&endpoint, &credentials, state.made + 1).await {
                Ok(live) => {
                    if state.cluster != Some(live.cluster) {
                        self.of_one_cluster(&live, &credentials).await?;
                        state.cluster = Some(live.cluster);
                    }
                    state.made += 1;
                    tracing::debug!(%endpoint, "connected to etcd");
                    state.live = Some(live.clone());
                    return Ok(live);
                }
                Err(trouble) if trouble.then == Then::Elsewhere => {
                    // A member that hangs is not asked twice.
                    let tls = credentials.tls.as_ref().filter(|_| began.elapsed() < CONNECT);
                    let handshake = timeout(CONNECT, self.shake_hands(&endpoint, tls)).await;
                    causes.push(handshake.ok().flatten().unwrap_or(trouble).sentence);
                }
                Err(trouble) => return Err(trouble),
            }
        }
        Err(Trouble::tell(causes.join("; ")))
    }

    /// Sees to it that no other endpoint answers for another cluster: a lease there would be none here. Who does not answer is
    /// not waited for.
    async fn of_one_cluster(&self, live: &Live, credentials: &Credentials) -> Result<(), Trouble> {
        for endpoint in self.options.endpoints.iter().filter(|endpoint| **endpoint != live.endpoint) {
            let answer = timeout(CONNECT, self.connect(endpoint, credentials, live.number)).await;
            if let Ok(Ok(other)) = answer
                && other.cluster != live.cluster
            {
                return Err(Trouble::two_clusters((&live.endpoint, live.cluster), (endpoint, other.cluster)));
            }
        }
        Ok(())
    }

    /// Forgets a connection that failed; the next one goes to another member.
    pub(super) async fn forget(&self, live: &Live) {
        let mut state = self.state.lock().await;
        if state.live.take_if(|current| current.number == live.number).is_some() {
            self.lost.send_modify(|lost| *lost += 1);
        }
    }

    /// Makes a new token for the connection and returns it with that.
    pub(super) async fn login_again(&self, live: &Live) -> Result<Live, Trouble> {
        let credentials = self.options.credentials().map_err(|error| Trouble::tell(error.to_string()))?;
        let mut renewed = live.clone();
        renewed.token = self.login(live, credentials.login.as_ref()).await?;
        let mut state = self.state.lock().await;
        if let Some(current) = state.live.as_mut().filter(|current| current.number == live.number) {
            *current = renewed.clone();
        }
        Ok(renewed)
    }

    /// Tells when a connection was found dead.
    pub(super) fn losses(&self) -> watch::Receiver<u64> {
        self.lost.subscribe()
    }

    /// Performs one call on a connection, within [`CALL`].
    pub(super) async fn call<Q, A>(&self, live: &Live, path: &'static str, request: Q) -> Result<A, Trouble>
    where
        Q: Message + Send + 'static,
        A: Message + Default + Send + 'static,
    {
        self.bounded(live, CALL, path, request).await
    }

    /// Opens a stream that begins with one request; the answers' end is up to etcd.
    pub(super) async fn stream<Q, A>(
        &self,
        live: &Live,
        path: &'static str,
        request: Q,
    ) -> Result<Streaming<A>, Trouble>
    where
        Q: Message + Send + 'static,
        A: Message + Default + Send + 'static,
    {
        let mut grpc = live.grpc.clone();
        // Never ended from this side: etcd ends a watch with its requests.
        let requests = tokio_stream::StreamExt::chain(tokio_stream::once(request), tokio_stream::pending());
        let request = live.dress(Request::new(requests));
        let opened = timeout(CALL, async {
            grpc.ready().await.map_err(|error| Trouble::connecting(&live.endpoint, &self.options, &error))?;
            let answer = grpc.streaming(request, path.parse().expect("a path"), ProstCodec::default()).await;
            answer.map_err(|status| Trouble::answered(&live.endpoint, &self.options, &status))
        });
        let answer = opened.await.map_err(|_| Trouble::late(&live.endpoint, CALL))??;
        Ok(answer.into_inner())
    }

    /// Waits for the next message of a stream, within [`CALL`].
    pub(super) async fn next<A>(&self, live: &Live, stream: &mut Streaming<A>) -> Result<A, Trouble> {
        let message =
            timeout(CALL, stream.message()).await.map_err(|_| Trouble::late(&live.endpoint, CALL))?;
        self.message(live, message)
    }

    /// Tells what a message of a stream is: its end is a failure too.
    pub(super) fn message<A>(
        &self,
        live: &Live,
        message: Result<Option<A>, tonic::Status>,
    ) -> Result<A, Trouble> {
        match message {
            Ok(Some(message)) => Ok(message),
            Ok(None) => Err(Trouble::elsewhere(format!("etcd at {} ended the stream", live.endpoint))),
            Err(status) => Err(Trouble::answered(&live.endpoint, &self.options, &status)),
        }
    }

    async fn bounded<Q, A>(
        &self,
        live: &Live,
        bound: Duration,
        path: &'static str,
        request: Q,
    ) -> Result<A, Trouble>
    where
        Q: Message + Send + 'static,
        A: Message + Default + Send + 'static,
    {
        let mut grpc = live.grpc.clone();
        let request = live.dress(Request::new(request));
        let answer = timeout(bound, async {
            grpc.ready().await.map_err(|error| Trouble::connecting(&live.endpoint, &self.options, &error))?;
            let answer = grpc.unary(request, path.parse().expect("a path"), ProstCodec::default()).await;
            answer.map_err(|status| Trouble::answered(&live.endpoint, &self.options, &status))
        });
        Ok(answer.await.map_err(|_| Trouble::late(&live.endpoint, bound))??.into_inner())
    }

    async fn connect(
        &self,
        endpoint: &Endpoint,
        credentials: &Credentials,
        number: u64,
    ) -> Result<Live, Trouble> {
        let refused = |error: tonic::transport::Error| Trouble::connecting(endpoint, &self.options, &error);
        let mut builder = Channel::builder(endpoint.uri())
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEP_ALIVE.0)
            .keep_alive_timeout(KEEP_ALIVE.1);
        if let Some(tls) = &credentials.tls {
            builder = builder.tls_config(tls.tonic.clone().domain_name(endpoint.host())).map_err(refused)?;
        }
        let channel = timeout(CONNECT, builder.connect()).await;
        let channel = channel.map_err(|_| Trouble::late(endpoint, CONNECT))?.map_err(refused)?;
        let grpc = Grpc::new(channel).max_decoding_message_size(MOST_BYTES);
        let mut live = Live { grpc, endpoint: endpoint.clone(), token: None, number, cluster: 0 };
        live.token = self.login(&live, credentials.login.as_ref()).await?;
        let probe = RangeRequest { key: super::calls::name_key(&self.options), range_end: Vec::new() };
        let answer = self.bounded::<_, RangeResponse>(&live, CONNECT, proto::RANGE, probe).await?;
        live.cluster = answer.header.map_or(0, |header| header.cluster_id);
        Ok(live)
    }

    /// Tries the handshake alone, for its reason: who sends a request at once may see the connection reset before
    /// it reads why a certificate was refused (TLS 1.3 tells after the client has finished).
    async fn shake_hands(&self, endpoint: &Endpoint, tls: Option<&Tls>) -> Option<Trouble> {
        let connector = TlsConnector::from(Arc::clone(&tls?.bare));
        let name = ServerName::try_from(endpoint.host().to_owned()).ok()?;
        let tcp = TcpStream::connect((endpoint.host(), endpoint.port())).await.ok()?;
        let error = match connector.connect(name, tcp).await {
            Ok(mut tls) => tls.read_u8().await.err()?,
            Err(error) => error,
        };
        // An end without a word says no more than what was seen already.
        let said = error.get_ref().is_some_and(|carried| carried.is::<tokio_rustls::rustls::Error>());
        said.then(|| Trouble::connecting(endpoint, &self.options, &error))
    }

    async fn login(
        &self,
        live: &Live,
        login: Option<&Login>,
    ) -> Result<Option<MetadataValue<Ascii>>, Trouble> {
        let Some(login) = login else { return Ok(None) };
        let mut bare = live.clone();
        bare.token = None;
        let request = AuthenticateRequest { name: login.user.clone(), password: login.password.clone() };
        let mut grpc = bare.grpc.clone();
        let request = bare.dress(Request::new(request));
        let answer = timeout(CONNECT, async {
            grpc.ready().await.map_err(|error| Trouble::connecting(&live.endpoint, &self.options, &error))?;
            let codec = ProstCodec::default();
            match grpc.unary(request, proto::AUTHENTICATE.parse().expect("a path"), codec).await {
                Ok(answer) => Ok(Some(answer.into_inner())),
                // As etcd's own client has it: without authentication any login will do.
                Err(status)
                    if status.code() == Code::FailedPrecondition
                        && status.message().contains("authentication is not enabled") =>
                {
                    Ok(None)
                }
                Err(status) => Err(Trouble::answered(&live.endpoint, &self.options, &status)),
            }
        });
        let answer: Option<AuthenticateResponse> =
            answer.await.map_err(|_| Trouble::late(&live.endpoint, CONNECT))??;
        let unusable = |_| Trouble::tell(format!("etcd at {} gave a token that is no text", live.endpoint));
        answer.map(|answer| answer.token.parse().map_err(unusable)).transpose()
    }
}

impl Live {
    /// Adds what etcd reads beside the message: who asks, and that a member without a leader must say so.
    fn dress<T>(&self, mut request: Request<T>) -> Request<T> {
        let metadata = request.metadata_mut();
        metadata.insert("hasleader", MetadataValue::from_static("true"));
        if let Some(token) = &self.token {
            metadata.insert("token", token.clone());
        }
        request
    }
}
