//! `tinker serve`: runs the server until it is told to stop or nobody needs it.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use serde_json::json;
use tinker_server::{
    ApiToken, Device, Quantization, ServeOptions, Server, TlsFiles, check_model_name, list_keys,
};

use super::live;
use crate::base_model;
use crate::context::Ctx;
use crate::failure::{Failure, FailureKind, Result};
use crate::human::{parse_duration, parse_size};
use crate::logging;
use crate::numbers::whole;
use crate::open_files;
use crate::output::Output;
use crate::signals::Interrupts;

#[derive(Debug, clap::Args)]
#[group(skip)]
pub(super) struct Args {
    /// Port to listen on; 0 takes any free one
    #[arg(long, value_name = "N", default_value_t = 8642, value_parser = parse_port)]
    port: u16,
    /// Address to listen on; any other than this machine's own needs a key of `tinker serve keys`
    #[arg(long, value_name = "ADDR", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    host: IpAddr,
    /// Serve by TLS with this certificate (PEM), read again when it changes
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Private key of the certificate (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Model directory to offer, in the Hugging Face layout, by its path or under NAME; may be repeated
    #[arg(long = "model", value_name = "[NAME=]DIR", value_parser = parse_model)]
    models: Vec<Offer>,
    /// Bits for the weights of base models; those of their files if absent
    #[arg(long, value_enum)]
    weights: Option<Weights>,
    /// Numbers that weights, and what they are multiplied with, are rounded to
    #[arg(long, value_enum, default_value_t)]
    precision: Precision,
    /// Memory for training beside weights, such as 2GB; what does not fit is computed again
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    training_memory: Option<u64>,
    /// What computes: the GPU if the program was built for it and one answers, else the CPU
    #[arg(long, value_enum, default_value_t = Computer::Auto)]
    device: Computer,
    /// Threads of the engine; 0 takes one per core
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = whole::<usize>)]
    threads: usize,
    /// Most that the server's files may take, such as 20GB; as much as there is if absent
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    max_disk: Option<u64>,
    /// Leave after this long without work, such as 15m; stays if absent
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    idle_timeout: Option<Duration>,
    /// Started by another command: the log is all it writes
    #[arg(long, hide = true)]
    detached: bool,
}

/// How weights are held when they are not those of the file.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Weights {
    /// 8 bits, with a scale for each output of a layer
    Int8,
    /// 4 bits: NF4, a float32 scale per 64 inputs, not quantized again
    Nf4,
}

/// What products with weights are computed with.
#[derive(Debug, Clone, Copy, Default, clap::ValueEnum)]
enum Precision {
    /// The accuracy of float32
    #[default]
    F32,
    /// As PyTorch computes with a bf16 model; faster with AMX or AVX512-BF16
    Bf16,
}

impl Precision {
    fn of_engine(self) -> tinker_server::Precision {
        match self {
            Self::F32 => tinker_server::Precision::F32,
            Self::Bf16 => tinker_server::Precision::Bf16,
        }
    }
}

impl Weights {
    fn quantization(self) -> Quantization {
        match self {
            Self::Int8 => Quantization::Int8,
            Self::Nf4 => Quantization::Nf4,
        }
    }
}

/// What computes.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Computer {
    /// A GPU for the models that it takes, if there is one; else the CPU
    Auto,
    /// The CPU
    Cpu,
    /// The first NVIDIA GPU, and nothing else
    Cuda,
}

impl Computer {
    fn device(self) -> Device {
        match self {
            Self::Auto => Device::Auto,
            Self::Cpu => Device::Cpu,
            Self::Cuda => Device::Cuda,
        }
    }
}

pub(super) fn run(ctx: &Ctx, args: Args) -> Result<Output> {
    logging::init(&ctx.ui, Some("info"));
    open_files::raise_limit();
    let options = options(ctx, &args)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let served = runtime.block_on(serve(ctx, options, args.detached));
    // After a second Ctrl-C the operation that runs is not waited for; its log outlives it.
    runtime.shutdown_background();
    served
}

/// Serves until the first request to leave, and what runs then has ended; or until the second.
async fn serve(ctx: &Ctx, options: ServeOptions, detached: bool) -> Result<Output> {
    let held = held(&options);
    let server = Server::bind(options).await?;
    let (mut first, mut all) = (Interrupts::watch()?, Interrupts::watch()?);
    // Whoever reads this may interrupt at once.
    if !detached {
        announce(ctx, &server, &held)?;
    }
    let twice = async {
        all.next().await;
        ctx.ui
            .note("finishing the operation that runs; Ctrl-C again leaves at once");
        all.next().await;
    };
    let watched = server.observer();
    tokio::select! {
        served = server.run(async move { first.next().await }) => {
            served?;
            Ok(Output::none())
        }
        never = live::show(&ctx.ui, watched) => match never {},
        () = twice => Err(Failure::new(FailureKind::Interrupted, "left at once")
            .hint("nothing acknowledged is lost: the next server goes on from the log")),
    }
}

fn options(ctx: &Ctx, args: &Args) -> Result<ServeOptions> {
    let key = ctx.settings.serve_key()?;
    if !args.host.is_loopback() && list_keys(&ctx.settings.home)?.is_empty() {
        return Err(Failure::usage(format!(
            "--host {} opens the server to other machines, and there is no key for other people",
            args.host
        ))
        .hint("make one with `tinker serve keys add NAME` and start it again"));
    }
    let (models, named_models) = offers(&args.models)?;
    Ok(ServeOptions {
        host: args.host,
        tls: tls(args),
        port: args.port,
        token: key.map(|key| ApiToken::new(key.expose())).transpose()?,
        models,
        named_models,
        training_memory: args.training_memory,
        weights: args.weights.map(Weights::quantization),
        device: args.device.device(),
        precision: args.precision.of_engine(),
        threads: args.threads,
        max_disk_bytes: args.max_disk,
        idle_timeout: args.idle_timeout,
        hf_cache: if args.detached {
            None
        } else {
            base_model::hub_cache()
        },
        version: env!("CARGO_PKG_VERSION").into(),
        ..ServeOptions::new(&ctx.settings.home)
    })
}

fn tls(args: &Args) -> Option<TlsFiles> {
    let (cert, key) = (args.tls_cert.clone()?, args.tls_key.clone()?);
    Some(TlsFiles { cert, key })
}

/// A model directory on offer, and the name for it if not its path.
#[derive(Debug, Clone)]
struct Offer {
    name: Option<String>,
    dir: PathBuf,
}

/// Reads `NAME=DIR` or `DIR`. A directory whose own path has a `=` is one.
fn parse_model(text: &str) -> std::result::Result<Offer, String> {
    let (name, dir) = match text.split_once('=') {
        Some((name, dir)) if !Path::new(text).is_dir() => (Some(name.to_owned()), dir),
        _ => (None, text),
    };
    if let Some(name) = &name {
        check_model_name(name)?;
    }
    Ok(Offer {
        name,
        dir: dir.into(),
    })
}

/// The full paths of model directories: those without and those with names.
fn offers(offers: &[Offer]) -> Result<(Vec<PathBuf>, BTreeMap<String, PathBuf>)> {
    let (mut models, mut named) = (Vec::new(), BTreeMap::new());
    for Offer { name, dir } in offers {
        let dir = base_model::full_path(dir)?;
        match name {
            None => models.push(dir),
            Some(name) => {
                if named.insert(name.clone(), dir).is_some() {
                    return Err(Failure::usage(format!("two models are named `{name}`")));
                }
            }
        }
    }
    Ok((models, named))
}

fn parse_port(text: &str) -> std::result::Result<u16, String> {
    text.parse()
        .map_err(|_| "write a port number, 0 to 65535".to_owned())
}

/// What is not as it would be without options, in words.
fn held(options: &ServeOptions) -> String {
    let weights = options
        .weights
        .map(|w| format!(" with {} weights", w.name()));
    let precision = match options.precision {
        tinker_server::Precision::F32 => "",
        tinker_server::Precision::Bf16 => " in bf16",
    };
    weights.unwrap_or_default() + precision
}

/// Says where it is: the data for people and shells is the two export lines.
fn announce(ctx: &Ctx, server: &Server, held: &str) -> Result<()> {
    let output = exports(&server.base_url(), server.token());
    output
        .print(ctx.format)
        .context("cannot write to standard output")?;
    if let Some(addr) = server.tls_addr() {
        ctx.ui.note(format_args!(
            "serving https on {addr} for other machines; the address above is for this one alone"
        ));
    }
    ctx.ui.note(format_args!(
        "serving {} from {}{held}; Ctrl-C stops it",
        server.base_url(),
        ctx.settings.home.display()
    ));
    Ok(())
}

/// The two lines that point a Tinker client at a server.
pub(super) fn exports(base_url: &str, key: &ApiToken) -> Output {
    let text = format!(
        "export TINKER_BASE_URL={base_url}\nexport TINKER_API_KEY={}\n",
        key.expose()
    );
    let json = json!({ "base_url": base_url, "api_key": key.expose() });
    Output::text(text, json)
}
