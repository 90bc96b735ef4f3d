//! Sizes, offsets, constants and signatures against what a C compiler says of `<ucp/api/ucp.h>`.
//!
//! The C program is made from the same list as the Rust values, so neither can be forgotten.

use std::mem::{offset_of, size_of};
use std::process::Command;

use ucx_sys::*;

struct Check {
    /// A C expression.
    c: String,
    /// What Rust thinks it is.
    rust: i64,
    /// Rust's may be larger: a padded structure.
    at_least: bool,
}

macro_rules! structures {
    ($checks:ident: $($structure:ident { $($field:ident),* $(,)? })*) => {
        $(
            $checks.push(Check {
                c: format!("sizeof({})", stringify!($structure)),
                rust: size_of::<$structure>() as i64,
                at_least: true,
            });
            $($checks.push(Check {
                c: format!("offsetof({}, {})", stringify!($structure), stringify!($field)),
                rust: offset_of!($structure, $field) as i64,
                at_least: false,
            });)*
        )*
    };
}

macro_rules! constants {
    ($checks:ident: $($constant:ident),* $(,)?) => {
        $($checks.push(Check { c: stringify!($constant).into(), rust: $constant as i64, at_least: false });)*
    };
}

fn checks() -> Vec<Check> {
    let mut checks = vec![Check {
        c: "sizeof(ucs_status_t)".into(),
        rust: size_of::<ucs_status_t>() as i64,
        at_least: false,
    }];
    structures! { checks:
        ucp_params_t {
            field_mask, features, request_size, request_init, request_cleanup, tag_sender_mask,
            mt_workers_shared, estimated_num_eps, estimated_num_ppn, name,
        }
        ucp_worker_params_t {
            field_mask, thread_mode, cpu_mask, events, user_data, event_fd, flags, name, am_alignment,
            client_id,
        }
        ucp_mem_map_params_t { field_mask, address, length, flags, prot, memory_type }
        ucp_mem_attr_t { field_mask, address, length, mem_type }
        ucp_err_handler_t { cb, arg }
        ucs_sock_addr_t { addr, addrlen }
        ucp_ep_params_t {
            field_mask, address, err_mode, err_handler, user_data, flags, sockaddr, conn_request, name,
            local_sockaddr,
        }
        ucp_request_param_t {
            op_attr_mask, flags, request, cb, datatype, user_data, reply_buffer, memory_type, recv_info,
            memh,
        }
        ucp_am_handler_param_t { field_mask, id, flags, cb, arg }
        ucp_am_recv_param_t { recv_attr, reply_ep }
    }
    constants! { checks:
        UCS_OK, UCS_INPROGRESS, UCS_ERR_NO_ELEM, UCS_ERR_BUSY, UCS_ERR_CANCELED,
        UCS_ERR_CONNECTION_RESET, UCS_ERR_ENDPOINT_TIMEOUT, UCS_ERR_LAST,
        UCP_FEATURE_RMA, UCP_FEATURE_WAKEUP, UCP_FEATURE_AM,
        UCP_AM_HANDLER_PARAM_FIELD_ID, UCP_AM_HANDLER_PARAM_FIELD_FLAGS, UCP_AM_HANDLER_PARAM_FIELD_CB,
        UCP_AM_HANDLER_PARAM_FIELD_ARG, UCP_AM_FLAG_WHOLE_MSG, UCP_AM_SEND_FLAG_EAGER,
        UCP_AM_RECV_ATTR_FLAG_RNDV,
        UCP_PARAM_FIELD_FEATURES, UCP_PARAM_FIELD_MT_WORKERS_SHARED,
        UCP_WORKER_PARAM_FIELD_THREAD_MODE, UCS_THREAD_MODE_SINGLE,
        UCP_MEM_MAP_PARAM_FIELD_ADDRESS, UCP_MEM_MAP_PARAM_FIELD_LENGTH, UCP_MEM_MAP_PARAM_FIELD_FLAGS,
        UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE, UCP_MEM_MAP_ALLOCATE,
        UCP_MEM_ATTR_FIELD_ADDRESS, UCP_MEM_ATTR_FIELD_LENGTH,
        UCP_EP_PARAM_FIELD_REMOTE_ADDRESS, UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE,
        UCP_EP_PARAM_FIELD_ERR_HANDLER, UCP_ERR_HANDLING_MODE_PEER,
        UCP_OP_ATTR_FIELD_CALLBACK, UCP_OP_ATTR_FIELD_USER_DATA, UCP_OP_ATTR_FIELD_FLAGS,
        UCP_OP_ATTR_FIELD_MEMORY_TYPE, UCP_OP_ATTR_FIELD_MEMH, UCP_EP_CLOSE_FLAG_FORCE,
        UCS_MEMORY_TYPE_HOST, UCS_MEMORY_TYPE_CUDA,
    }
    checks
}

#[test]
fn layout_agrees_with_the_c_headers() {
    let checks = checks();
    let printed = c_values(&checks);
    assert_eq!(
        printed.len(),
        checks.len(),
        "the C program printed another number of values"
    );
    for (check, c) in checks.iter().zip(printed) {
        let agrees = if check.at_least {
            check.rust >= c
        } else {
            check.rust == c
        };
        assert!(agrees, "{} is {c} in C and {} in Rust", check.c, check.rust);
    }
}

#[test]
fn status_pointers_have_three_meanings() {
    assert_eq!(status_of_pointer(std::ptr::null_mut()), Ok(None));
    assert_eq!(
        status_of_pointer(UCS_ERR_CANCELED as isize as *mut _),
        Err(UCS_ERR_CANCELED)
    );
    assert_eq!(
        status_of_pointer(UCS_ERR_LAST as isize as *mut _),
        Err(UCS_ERR_LAST)
    );
    let request = 0x1000 as *mut _;
    assert_eq!(status_of_pointer(request), Ok(Some(request)));
}

fn c_values(checks: &[Check]) -> Vec<i64> {
    let mut source = String::from(
        "#include <ucp/api/ucp.h>\n#include <stddef.h>\n#include <stdio.h>\nint main(void) {\n",
    );
    for check in checks {
        source += &format!("printf(\"%lld\\n\", (long long)({}));\n", check.c);
    }
    source += "return 0; }\n";

    let directory = std::path::Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (file, program) = (directory.join("layout.c"), directory.join("layout"));
    std::fs::write(&file, source).expect("target/tmp is writable");
    let compiled = Command::new("cc")
        .arg("-o")
        .arg(&program)
        .arg(&file)
        .output()
        .expect("this test needs a C compiler: run container/install-deps.sh, or install gcc");
    assert!(
        compiled.status.success(),
        "this test needs UCX's headers: run container/install-deps.sh, or install libucx-dev\n{}",
        String::from_utf8_lossy(&compiled.stderr)
    );
    let output = Command::new(&program)
        .output()
        .expect("the program was just compiled");
    assert!(output.status.success(), "the C program failed");
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(|line| line.parse().expect("the program prints integers"))
        .collect()
}
