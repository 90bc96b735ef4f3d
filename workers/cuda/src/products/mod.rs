//! Matrix products: a weight matrix with its format, by few rows (`skinny`) or many (`many`, through the products that
//! `gemm` plans with cuBLASLt).

pub(crate) mod gemm;
pub(crate) mod matrix;
pub(crate) mod prefill_gemm;
pub(crate) mod skinny;
