// Read bandwidth: every 16 bytes once, four loads in flight a thread; the sum keeps the compiler honest.
extern "C" __global__ void read_sum(const uint4* data, long long count, unsigned* out) {
    unsigned sum = 0;
    long long stride = (long long)gridDim.x * blockDim.x, i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    for (; i + 3 * stride < count; i += 4 * stride) {
        uint4 a = __ldcs(data + i), b = __ldcs(data + i + stride), c = __ldcs(data + i + 2 * stride), d = __ldcs(data + i + 3 * stride);
        sum += (a.x ^ a.y ^ a.z ^ a.w) + (b.x ^ b.y ^ b.z ^ b.w) + (c.x ^ c.y ^ c.z ^ c.w) + (d.x ^ d.y ^ d.z ^ d.w);
    }
    for (; i < count; i += stride) sum += data[i].x ^ data[i].y ^ data[i].z ^ data[i].w;
    if (sum == 0x12345678u) out[0] = sum;
}
