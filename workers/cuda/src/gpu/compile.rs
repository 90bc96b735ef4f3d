//! Kernel sources, and their way to machine code: NVRTC at the first start, a file ever after.

use std::ffi::{CStr, CString};
use std::path::{Path, PathBuf};

use cudarc::nvrtc::sys;
use sha2::{Digest, Sha256};

use super::libraries;
use super::sources::{HEADERS, Source};
use crate::error::CudaError;

/// A compiler for one architecture.
pub struct Compiler {
    architecture: String,
    includes: Vec<PathBuf>,
    version: (i32, i32),
    cache: Option<PathBuf>,
}

/// Machine code, and what the assembler said of it.
pub struct Cubin {
    /// An ELF image.
    pub image: Vec<u8>,
    /// Warnings, and with [`Compiler::verbose`] options the registers and spills of each kernel.
    pub log: String,
}

impl Compiler {
    /// For a GPU of this capability. Hopper's own instructions are asked for by `sm_90a`.
    ///
    /// # Errors
    /// [`CudaError::Library`] without NVRTC.
    pub fn for_capability((major, minor): (u32, u32)) -> Result<Self, CudaError> {
        let own = if (major, minor) == (9, 0) { "a" } else { "" };
        Self::new(&format!("sm_{major}{minor}{own}"), &[])
    }

    /// For an architecture: `sm_90a`. NVRTC is also searched for in these Python environments.
    ///
    /// # Errors
    /// [`CudaError::Library`] without NVRTC.
    pub fn new(architecture: &str, environments: &[PathBuf]) -> Result<Self, CudaError> {
        let includes = libraries::nvrtc(environments)?;
        let mut version = (0, 0);
        // SAFETY: two integers are written.
        unsafe { sys::nvrtcVersion(&mut version.0, &mut version.1) };
        Ok(Self {
            architecture: architecture.to_owned(),
            includes,
            version,
            cache: cache_directory(),
        })
    }

    /// The same, with one more directory of headers.
    pub fn including(mut self, directory: PathBuf) -> Self {
        self.includes.push(directory);
        self
    }

    /// Machine code of a source with some `NAME=VALUE` defines, from the cache if it is there.
    ///
    /// # Errors
    /// [`CudaError::Compile`] with the compiler's words.
    pub fn compile(&self, source: &Source, defines: &[String]) -> Result<Vec<u8>, CudaError> {
        let options = self.options(defines);
        let file = self.cache.as_ref().map(|cache| {
            let name = format!("{}-{}.cubin", source.name, self.key(source, &options));
            cache.join(name)
        });
        if let Some(image) = file.as_ref().and_then(|file| std::fs::read(file).ok()) {
            return Ok(image);
        }
        let image = self.run(source, &options)?.image;
        if let Some(file) = file {
            let _ = keep(&file, &image); // a cache that cannot be written costs time, nothing else
        }
        Ok(image)
    }

    /// Compiles again, and has the assembler report registers and spills.
    ///
    /// # Errors
    /// As [`Compiler::compile`].
    pub fn verbose(&self, source: &Source, defines: &[String]) -> Result<Cubin, CudaError> {
        let mut options = self.options(defines);
        options.push("--ptxas-options=-v".to_owned());
        self.run(source, &options)
    }

    /// NVRTC's version: major, minor.
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    fn options(&self, defines: &[String]) -> Vec<String> {
        let mut options = vec![
            format!("--gpu-architecture={}", self.architecture),
            "-std=c++17".to_owned(),
            "-default-device".to_owned(),
        ];
        options.extend(
            self.includes
                .iter()
                .map(|path| format!("-I{}", path.display())),
        );
        options.extend(defines.iter().map(|define| format!("-D{define}")));
        options
    }

    fn key(&self, source: &Source, options: &[String]) -> String {
        let mut hash = Sha256::new();
        let mut part = |text: &str| {
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text);
        };
        part(&format!("{}.{}", self.version.0, self.version.1));
        part(source.text);
        for (name, text) in HEADERS {
            part(name);
            part(text);
        }
        for option in options {
            part(option);
        }
        let digest = hash.finalize();
        digest[..16]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }

    fn run(&self, source: &Source, options: &[String]) -> Result<Cubin, CudaError> {
        let failed = |log: String| CudaError::Compile {
            file: source.name.to_owned(),
            log,
        };
        let text = |text: &str| CString::new(text).map_err(|e| failed(e.to_string()));
        let options: Vec<CString> = options.iter().map(|o| text(o)).collect::<Result<_, _>>()?;
        let headers = HEADERS
            .iter()
            .map(|(name, code)| Ok((text(name)?, text(code)?)));
        let headers: Vec<(CString, CString)> = headers.collect::<Result<_, CudaError>>()?;
        let names: Vec<_> = headers.iter().map(|(name, _)| name.as_ptr()).collect();
        let codes: Vec<_> = headers.iter().map(|(_, code)| code.as_ptr()).collect();
        let program = Program::new(&text(source.text)?, &text(source.name)?, &codes, &names)
            .map_err(failed)?;
        let options: Vec<_> = options.iter().map(|option| option.as_ptr()).collect();
        // SAFETY: a live program; the options outlive the call.
        let result =
            unsafe { sys::nvrtcCompileProgram(program.0, options.len() as i32, options.as_ptr()) };
        let log = program.log();
        if result != sys::nvrtcResult::NVRTC_SUCCESS {
            return Err(failed(format!(
                "{} for {}\n{log}",
                error_text(result),
                self.architecture
            )));
        }
        let image = program.cubin().map_err(failed)?;
        Ok(Cubin { image, log })
    }
}

/// An NVRTC program, destroyed on drop.
struct Program(sys::nvrtcProgram);

impl Program {
    fn new(
        source: &CStr,
        name: &CStr,
        headers: &[*const std::ffi::c_char],
        names: &[*const std::ffi::c_char],
    ) -> Result<Self, String> {
        let mut program = std::ptr::null_mut();
        // SAFETY: strings that outlive the call, which copies them; arrays of equal length.
        let result = unsafe {
            sys::nvrtcCreateProgram(
                &mut program,
                source.as_ptr(),
                name.as_ptr(),
                headers.len() as i32,
                headers.as_ptr(),
                names.as_ptr(),
            )
        };
        check(result).map(|()| Self(program))
    }

    fn log(&self) -> String {
        let mut size = 0;
        // SAFETY: a live program; the buffer is as long as it says.
        unsafe {
            if check(sys::nvrtcGetProgramLogSize(self.0, &mut size)).is_err() {
                return String::new();
            }
            let mut log = vec![0u8; size];
            let _ = sys::nvrtcGetProgramLog(self.0, log.as_mut_ptr().cast());
            String::from_utf8_lossy(&log)
                .trim_end_matches('\0')
                .trim()
                .to_owned()
        }
    }

    fn cubin(&self) -> Result<Vec<u8>, String> {
        let mut size = 0;
        // SAFETY: a live, compiled program; the buffer is as long as it says.
        unsafe {
            check(sys::nvrtcGetCUBINSize(self.0, &mut size))?;
            let mut image = vec![0u8; size];
            check(sys::nvrtcGetCUBIN(self.0, image.as_mut_ptr().cast()))?;
            Ok(image)
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: made in `new`.
        unsafe { sys::nvrtcDestroyProgram(&mut self.0) };
    }
}

fn check(result: sys::nvrtcResult) -> Result<(), String> {
    match result {
        sys::nvrtcResult::NVRTC_SUCCESS => Ok(()),
        other => Err(error_text(other)),
    }
}

fn error_text(result: sys::nvrtcResult) -> String {
    // SAFETY: a constant string of the library for any value.
    let text = unsafe { CStr::from_ptr(sys::nvrtcGetErrorString(result)) };
    text.to_string_lossy().into_owned()
}

/// `$XDG_CACHE_HOME/baton/kernels` or `~/.cache/baton/kernels`.
fn cache_directory() -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    Some(cache.or_else(home)?.join("baton/kernels"))
}

/// Writes beside and renames: two workers that start at once never see half a file.
fn keep(file: &Path, image: &[u8]) -> std::io::Result<()> {
    if let Some(parent) = file.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let beside = file.with_extension(format!("{}", std::process::id()));
    std::fs::write(&beside, image)?;
    std::fs::rename(beside, file)
}
