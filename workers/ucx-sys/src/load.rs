//! Finding and loading libucp.

use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LAZY};

use crate::{UCP_API_MAJOR, UCP_API_MINOR, Ucp};

/// Environment variable that names the directory to load UCX from: one that holds `libucp.so.0`, or
/// that of a PyPI wheel (`…/site-packages/libucx`). Where it is empty the system's own is taken; where it
/// is not set, that of the Python environment that the program is installed in, if there is one, comes first.
pub const LIB_DIR_VARIABLE: &str = "BATON_UCX_LIB_DIR";

/// What libucp needs, in the order in which these need each other.
const DEPENDENCIES: [&str; 3] = ["libucm.so.0", "libucs.so.0", "libuct.so.0"];

/// Why there is no UCX.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LoadError {
    /// The directory named by [`LIB_DIR_VARIABLE`] holds no `libucp.so.0`.
    Directory(PathBuf),
    /// The loader refused a library.
    Library {
        /// Which one.
        name: String,
        /// What it said.
        detail: String,
    },
    /// The library is older than the interface described here.
    TooOld {
        /// Its version: major, minor, release.
        version: (u32, u32, u32),
    },
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => write!(
                f,
                "{LIB_DIR_VARIABLE}={} holds no libucp.so.0, and neither does lib/ below it",
                path.display()
            ),
            Self::Library { name, detail } => write!(
                f,
                "cannot load {name}: {detail}; install UCX (apt-get install libucx0, or pip install libucx-cu13 beside a baton that came by pip) \
                 or name its directory in {LIB_DIR_VARIABLE}"
            ),
            Self::TooOld {
                version: (major, minor, release),
            } => write!(
                f,
                "UCX {major}.{minor}.{release} is too old, at least {UCP_API_MAJOR}.{UCP_API_MINOR} is needed"
            ),
        }
    }
}

impl std::error::Error for LoadError {}

impl Ucp {
    /// Loads UCX, once per process; later calls return the same. It is never unloaded: it starts
    /// threads and leaves handlers behind.
    ///
    /// # Errors
    /// [`LoadError`] if there is none, or none that fits.
    pub fn load() -> Result<&'static Self, LoadError> {
        static UCP: OnceLock<Result<Ucp, LoadError>> = OnceLock::new();
        UCP.get_or_init(|| {
            let named = std::env::var_os(LIB_DIR_VARIABLE);
            let program = std::env::current_exe().ok();
            load(directory(named, program.as_deref()).as_deref())
        })
        .as_ref()
        .map_err(Clone::clone)
    }

    /// Version of the library: major, minor, release.
    pub fn version(&self) -> (u32, u32, u32) {
        let (mut major, mut minor, mut release) = (0, 0, 0);
        // SAFETY: three valid places to write to.
        unsafe { (self.ucp_get_version)(&mut major, &mut minor, &mut release) };
        (major, minor, release)
    }
}

/// The directory to load from, by the variable and by where the program lies; none means the system's.
fn directory(named: Option<OsString>, program: Option<&Path>) -> Option<PathBuf> {
    match named {
        Some(named) => Some(PathBuf::from(named)).filter(|named| !named.as_os_str().is_empty()),
        None => beside(program?),
    }
}

/// The package `libucx-cu13` or `libucx-cu12` of the Python environment that `program` is installed in: pip and uv put the one
/// into `bin`, the other into `lib/python3.N/site-packages` (`dist-packages` where Debian's own Python is meant).
fn beside(program: &Path) -> Option<PathBuf> {
    let bin = program.parent().filter(|bin| bin.ends_with("bin"))?;
    let pythons = fs::read_dir(bin.parent()?.join("lib")).ok()?.flatten();
    let mut found: Vec<_> = pythons
        .map(|python| python.path())
        .filter(|python| {
            let name = python.file_name().unwrap_or_default();
            name.to_string_lossy().starts_with("python3")
        })
        .flat_map(|python| {
            ["site-packages", "dist-packages"].map(|it| python.join(it).join("libucx"))
        })
        .filter(|package| package.join("lib/libucp.so.0").exists())
        .collect();
    // Environments have one Python; where there are several, it shall be the same each time.
    found.sort();
    found.into_iter().next()
}

fn load(directory: Option<&Path>) -> Result<Ucp, LoadError> {
    let library = match directory {
        // The loader finds what libucp needs by itself.
        None => open(Path::new("libucp.so.0"))?,
        Some(directory) => {
            let directory = [directory.to_path_buf(), directory.join("lib")]
                .into_iter()
                .find(|candidate| candidate.join("libucp.so.0").exists())
                .ok_or_else(|| LoadError::Directory(directory.to_path_buf()))?;
            // Each by its path and for all to see, or the loader would take the next one's needs from
            // the system and mix two builds.
            for name in DEPENDENCIES {
                std::mem::forget(open(&directory.join(name))?);
            }
            open(&directory.join("libucp.so.0"))?
        }
    };
    // SAFETY: it is a libucp, and forgotten below, so it stays loaded.
    let resolved = unsafe { Ucp::resolve(&library) };
    std::mem::forget(library);
    let ucp = resolved.map_err(|error| LoadError::Library {
        name: "libucp.so.0".into(),
        detail: reason(&error),
    })?;
    let version = ucp.version();
    if (version.0, version.1) < (UCP_API_MAJOR, UCP_API_MINOR) {
        return Err(LoadError::TooOld { version });
    }
    Ok(ucp)
}

fn open(path: &Path) -> Result<Library, LoadError> {
    // Lazily: libucm of 1.22 calls into libucs, which needs libucm.
    // SAFETY: UCX's initialisers start no threads and touch only UCX's own state; loading them is what
    // every program linked with UCX does.
    unsafe { Library::open(Some(path), RTLD_LAZY | RTLD_GLOBAL) }.map_err(|error| {
        LoadError::Library {
            name: path.display().to_string(),
            detail: reason(&error),
        }
    })
}

/// What the loader itself said: the error only names the call that failed.
fn reason(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), |source| source.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_directory_is_named_in_the_error() {
        let error = load(Some(Path::new("/nonexistent/ucx")))
            .err()
            .expect("nothing is there");
        assert_eq!(error, LoadError::Directory("/nonexistent/ucx".into()));
        assert!(error.to_string().contains("/nonexistent/ucx"), "{error}");
    }

    #[test]
    fn the_environment_of_the_program_comes_before_the_system_and_what_is_named_before_both() {
        let root = std::env::temp_dir().join(format!("baton-ucx-beside-{}", std::process::id()));
        let program = root.join("venv/bin/baton");
        let package = root.join("venv/lib/python3.11/site-packages/libucx");
        assert_eq!(directory(None, Some(&program)), None, "nothing is there");
        fs::create_dir_all(package.join("lib")).expect("a directory");
        assert_eq!(
            directory(None, Some(&program)),
            None,
            "a package without libucp"
        );
        fs::write(package.join("lib/libucp.so.0"), "").expect("a file");
        assert_eq!(directory(None, Some(&program)), Some(package));
        let named = |text: &str| directory(Some(text.into()), Some(&program));
        assert_eq!(named("/opt/ucx"), Some("/opt/ucx".into()));
        assert_eq!(named(""), None, "the system's, expressly");
        let elsewhere = root.join("venv/release/baton");
        assert_eq!(directory(None, Some(&elsewhere)), None);
        fs::remove_dir_all(&root).expect("it was made here");
    }

    #[test]
    fn the_installed_ucx_loads_and_says_its_version() {
        let ucp =
            Ucp::load().expect("install libucx0 (container/install-deps.sh) to run this test");
        assert!(ucp.version() >= (1, 13, 0), "{:?}", ucp.version());
    }
}
