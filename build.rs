//! Compiles the contract and tells the linker where libtorch will be at run time.

use std::{env, error::Error, fs, path::PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors =
        protox::compile(["spatialscore/v1/spatialscore.proto", "grpc/health/v1/health.proto"], ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    // Served by reflection.
    fs::write(out.join("descriptors.bin"), protox::prost::Message::encode_to_vec(&descriptors))?;
    // What callers of the public port are not shown.
    let descriptors = protox::compile(
        ["spatialscore/v1/admin.proto", "spatialscore/v1/spatialscore.proto", "grpc/health/v1/health.proto"],
        ["proto"],
    )?;
    fs::write(out.join("all_descriptors.bin"), protox::prost::Message::encode_to_vec(&descriptors))?;
    tonic_prost_build::configure()
        // Pictures stay in the buffer in which they came.
        .bytes(".spatialscore.v1")
        .extern_path(".google.rpc.Status", "::tonic_types::Status")
        .compile_fds(descriptors)?;

    // The library's real place, not the folder of links that it is linked through: the run paths inside
    // libtorch are relative to it.
    let lib = PathBuf::from(env::var("DEP_TCH_LIBTORCH_LIB")?);
    let real = lib.join("libtorch_cpu.so").canonicalize().map_err(|e| {
        format!("no libtorch in {}: {e}; `make libtorch` fetches it, or set LIBTORCH", lib.display())
    })?;
    if let Some(folder) = real.parent() {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", folder.display());
    }
    Ok(())
}
