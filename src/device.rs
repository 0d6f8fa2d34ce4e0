//! The devices that a model can run on, and how CUDA comes into a binary that was not linked with it.

use std::env;
use std::error::Error;
use std::fmt::{self, Display};
use std::str::FromStr;
use std::thread::available_parallelism;

use tch::{Cuda, Device, Kind, Tensor};

/// CUDA's half of libtorch. Its run path, and the binary's, say where it lies: beside `libtorch_cpu.so`.
const CUDA_LIBRARY: &str = "libtorch_cuda.so";

/// Where the model shall run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Devices {
    /// Every CUDA device, or the CPU where there is none.
    Auto,
    /// These, one worker each.
    These(Vec<Device>),
}

/// A device that was asked for cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("{wanted} was asked for: {reason}")]
pub struct NoDevice {
    wanted: String,
    reason: String,
}

impl Devices {
    /// How devices are written.
    pub const FORMS: &str = "auto, cpu, or cuda:N, several of them separated by commas";

    /// The devices themselves. Brings CUDA in where it may be needed.
    ///
    /// # Errors
    /// A CUDA device that was named is not there.
    pub fn resolve(&self) -> Result<Vec<Device>, NoDevice> {
        match self {
            Self::Auto => Ok(match open_cuda() {
                Ok(count) => (0..count).map(Device::Cuda).collect(),
                Err(reason) => {
                    tracing::info!(reason, "no CUDA: the model runs on the CPU");
                    vec![Device::Cpu]
                }
            }),
            Self::These(devices) => {
                let wanted = devices.iter().filter_map(|device| match device {
                    Device::Cuda(index) => Some(*index),
                    _ => None,
                });
                if let Some(most) = wanted.max() {
                    let error = |reason| NoDevice { wanted: format!("cuda:{most}"), reason };
                    let count = open_cuda().map_err(error)?;
                    if most >= count {
                        return Err(error(format!("this machine has CUDA devices 0 to {}", count - 1)));
                    }
                }
                Ok(devices.clone())
            }
        }
    }
}

impl FromStr for Devices {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        let devices: Vec<Device> =
            text.split(',').map(|name| parse(name.trim())).collect::<Result<_, _>>()?;
        // Two workers on one device would only hold its weights twice.
        let twice = devices.iter().enumerate().any(|(i, device)| devices[..i].contains(device));
        if twice { Err(()) } else { Ok(Self::These(devices)) }
    }
}

fn parse(name: &str) -> Result<Device, ()> {
    match name.split_once(':') {
        None if name == "cpu" => Ok(Device::Cpu),
        Some(("cuda", index)) => index.parse::<u8>().map(|index| Device::Cuda(index.into())).map_err(drop),
        _ => Err(()),
    }
}

/// The name of a device, as settings write it.
pub fn name(device: Device) -> String {
    match device {
        Device::Cuda(index) => format!("cuda:{index}"),
        Device::Cpu => "cpu".to_owned(),
        other => format!("{other:?}").to_lowercase(),
    }
}

/// The number format of the weights and of the forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// bfloat16 on CUDA, float32 on the CPU.
    Auto,
    /// 32-bit floats.
    Float32,
    /// Brain floats.
    Bfloat16,
    /// IEEE half floats.
    Float16,
}

impl Dtype {
    /// How number formats are written.
    pub const FORMS: &str = "auto, float32, bfloat16 or float16";

    /// The format for a model on this device.
    pub fn on(self, device: Device) -> Kind {
        match self {
            Self::Auto if device.is_cuda() => Kind::BFloat16,
            Self::Auto | Self::Float32 => Kind::Float,
            Self::Bfloat16 => Kind::BFloat16,
            Self::Float16 => Kind::Half,
        }
    }
}

impl FromStr for Dtype {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "auto" => Ok(Self::Auto),
            "float32" => Ok(Self::Float32),
            "bfloat16" => Ok(Self::Bfloat16),
            "float16" => Ok(Self::Float16),
            _ => Err(()),
        }
    }
}

/// The name of a number format on the wire and in settings.
pub fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Float => "float32",
        Kind::BFloat16 => "bfloat16",
        Kind::Half => "float16",
        _ => "other",
    }
}

impl Display for Devices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::These(devices) => {
                f.write_str(&devices.iter().map(|&d| name(d)).collect::<Vec<_>>().join(","))
            }
        }
    }
}

/// The cores that a forward may keep busy: those that the process may run on, and no more than its control group has
/// time for, a fraction rounded down but to one at least. OpenMP knows nothing of groups, and what it does beyond its
/// share is halted in the middle of an operation. `None` where its user has told it how many threads to take.
pub fn cores() -> Option<usize> {
    if env::var_os("OMP_NUM_THREADS").is_some() {
        return None;
    }
    let own = usize::try_from(tch::get_num_threads()).unwrap_or(1);
    available_parallelism().ok().map(|cores| own.min(cores.get()))
}

/// The bytes that are free on a device, as far as the system says it: on the CPU of the machine's memory and of what the
/// process's control group leaves it.
pub fn free_memory(device: Device) -> Option<u64> {
    match device {
        Device::Cpu => free_cpu_memory(),
        Device::Cuda(index) => free_cuda_memory(i32::try_from(index).ok()?),
        _ => None,
    }
}

/// Gives memory that nothing uses any more back to a device, by its name, for other processes to have. On the CPU
/// [`crate::process::trim`] does.
pub fn release(name: &str) {
    let Ok(device @ Device::Cuda(_)) = parse(name) else { return };
    // What libtorch keeps for later use it lets go of before it reports that there is not enough. tch has no other way to
    // say so; no device has as much as this.
    const MORE_THAN_THERE_IS: i64 = 1 << 48;
    let _ = Tensor::f_empty([MORE_THAN_THERE_IS], (Kind::Uint8, device));
}

fn free_cpu_memory() -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let available = line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10;
    let of_group = |file: &str| {
        std::fs::read_to_string(format!("/sys/fs/cgroup/{file}")).ok()?.trim().parse::<u64>().ok()
    };
    // Without a limit the first says "max". Files that are kept in memory give way.
    let Some((max, used)) = of_group("memory.max").zip(of_group("memory.current")) else {
        return Some(available);
    };
    let stat = std::fs::read_to_string("/sys/fs/cgroup/memory.stat").unwrap_or_default();
    let of_stat = |key: &str| {
        stat.lines().find_map(|line| line.strip_prefix(key)?.trim().parse::<u64>().ok()).unwrap_or_default()
    };
    let files = of_stat("inactive_file ") + of_stat("active_file ");
    Some(available.min(max.saturating_sub(used.saturating_sub(files))))
}

/// What `cudaMemGetInfo` says, of the CUDA runtime that came with libtorch's CUDA half.
#[allow(unsafe_code)]
fn free_cuda_memory(index: i32) -> Option<u64> {
    use libloading::os::unix::{Library, Symbol};
    type SetDevice = unsafe extern "C" fn(i32) -> i32;
    type MemGetInfo = unsafe extern "C" fn(*mut usize, *mut usize) -> i32;
    // The current device is the thread's, so another's is not changed.
    let asked = std::thread::spawn(move || {
        let program = Library::this();
        // SAFETY: these are the signatures of the CUDA runtime, whose functions may be called from any thread; the
        // library that has them is never closed.
        unsafe {
            let set_device: Symbol<SetDevice> = program.get(b"cudaSetDevice\0").ok()?;
            let mem_get_info: Symbol<MemGetInfo> = program.get(b"cudaMemGetInfo\0").ok()?;
            let (mut free, mut total) = (0, 0);
            (set_device(index) == 0 && mem_get_info(&mut free, &mut total) == 0).then_some(free as u64)
        }
    });
    asked.join().ok()?
}

/// Adds the CUDA backend to libtorch and says how many devices it finds: at least one, or why there is none.
fn open_cuda() -> Result<usize, String> {
    load_cuda_library().map_err(|error| {
        // The loader's own words, which name the library that is missing, stand one level down.
        let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
        format!("opening {CUDA_LIBRARY}: {error}{cause}")
    })?;
    match usize::try_from(Cuda::device_count()) {
        Ok(count) if count > 0 => Ok(count),
        _ => Err(format!("{CUDA_LIBRARY} is loaded, but the driver shows no device")),
    }
}

#[allow(unsafe_code)]
fn load_cuda_library() -> Result<(), libloading::Error> {
    use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
    // SAFETY: the library's initialisers register libtorch's CUDA kernels and do nothing else; libtorch is made to
    // be extended in this way, and the library is the one that was built with the libtorch_cpu.so in use. The
    // registered kernels are used until the process ends, so the library is never closed.
    let library = unsafe { Library::open(Some(CUDA_LIBRARY), RTLD_NOW | RTLD_GLOBAL) }?;
    std::mem::forget(library);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_as_they_are_written() {
        for text in ["auto", "cpu", "cuda:0", "cuda:0,cuda:1", "cuda:3,cpu"] {
            assert_eq!(text.parse::<Devices>().unwrap().to_string(), text);
        }
        for text in ["", "gpu", "cuda", "cuda:", "cuda:-1", "cuda:0,", "cuda:0,cuda:0", "cpu:0", "auto,cpu"] {
            assert!(text.parse::<Devices>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_device_that_is_not_there_is_named() {
        let error = "cpu,cuda:200".parse::<Devices>().unwrap().resolve().unwrap_err();
        assert!(error.to_string().starts_with("cuda:200 was asked for: "), "{error}");
        assert!(!Devices::Auto.resolve().unwrap().is_empty());
    }

    #[test]
    fn auto_follows_the_device() {
        assert_eq!(Dtype::Auto.on(Device::Cpu), Kind::Float);
        assert_eq!(Dtype::Auto.on(Device::Cuda(0)), Kind::BFloat16);
        assert_eq!(Dtype::Float16.on(Device::Cpu), Kind::Half);
    }
}
