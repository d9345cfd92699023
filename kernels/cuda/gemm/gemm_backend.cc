// GemmBackend: weights on the device and the choice between the streaming kernels, for few rows,
// and cuBLASLt, for many.
#include <algorithm>
#include <array>
#include <string>
#include <utility>

#include "base/check.h"
#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/gemm/cublas_lt.h"
#include "kernels/cuda/gemm/gated.h"
#include "kernels/cuda/gemm/ordered.h"
#include "kernels/cuda/gemm/params.h"
#include "kernels/cuda/gemm/row_quantized.h"
#include "kernels/cuda/gemm/weight_upload.h"
#include "kernels/quant_block.h"

namespace gloam::cuda {
namespace {

// Most rows of x that the streaming kernels take before cuBLASLt is faster.
constexpr int64_t kMaxStreamedBF16 = 16;
// Rows of x that the kernel of batch-invariant mode takes in any mode, of large bf16 weights: fewer
// are streamed, more go to cuBLASLt, of gated products to other kernels. A layer of Llama-3.1-8B on
// an H100 (2026-11-26), us with that kernel and otherwise: 4 rows 152.5 and 151.5, 8 rows 152.3 and
// 155.6, 16 rows 152.9 and 163.3, 64 rows 158.6 and 165.2, 128 rows 171.2 and 166.8.
constexpr int64_t kMinOrdered = 8;
constexpr int64_t kMaxOrdered = 64;
constexpr int64_t kMaxOrderedGated = 256;
constexpr int64_t kMinOrderedElements = 8 << 20;
// Candidates of greedy rows. A step of Llama-3.1-8B by 8, 64, 128 and 256 rows, ms with them and
// with all logits (H100, 2026-11-27): 6.31, 8.67, 12.10, 18.92 and 6.34, 8.71, 12.23, 19.06.
constexpr int64_t kMaxOrderedGreedy = 256;
// Long sums that the kernel splits: cuBLASLt needs rows of x in 64s for its best (cublas_lt.cc).
// Down of Llama-3.1-8B, us with the kernel and with cuBLASLt (gemm_cuda_bench, H100, 2026-11-26):
// 80 rows 44.0 and 47.8, 112 rows 44.8 and 49.1, 160 rows 48.4 and 52.7, 224 rows 51.1 and 59.2;
// but 128 rows 45.5 and 44.2, 256 rows 53.1 and 52.5.
constexpr int64_t kMaxOrderedLong = 256;
// For cuBLASLt, packed weights are dequantised each time.
constexpr int64_t kMaxStreamedFP8 = 96;
constexpr int64_t kMaxStreamedQuantized = 192;

// Fewest rows of x, beyond a decode batch's, that a gated product takes in one kernel.
// gated_gemm_bench on an H100 (2026-11-26), us in one and in two kernels: 768 rows 263 and 257,
// 1024 rows 310 and 348.
constexpr int64_t kMinGated = 1024;

// Rows of a quantised weight are dequantised this many bytes at a time.
constexpr size_t kScratchBytes = 64 << 20;

class DeviceWeight final : public Weight {
 public:
  DeviceWeight(WeightType type, const DeviceMatrix& matrix, Buffer data, Buffer row_scales = {})
      : type_(type), matrix_(matrix), data_(std::move(data)), row_scales_(std::move(row_scales)) {}

  WeightType type() const override { return type_; }
  int64_t rows() const override { return matrix_.rows; }
  int64_t cols() const override { return matrix_.cols; }
  int64_t bytes() const override {
    return static_cast<int64_t>(data_.bytes() + row_scales_.bytes());
  }
  const DeviceMatrix& matrix() const { return matrix_; }

 private:
  WeightType type_;
  DeviceMatrix matrix_;
  Buffer data_;
  Buffer row_scales_;  // of fp8
};

const DeviceMatrix& MatrixOf(const Weight* weight) {
  return static_cast<const DeviceWeight*>(weight)->matrix();
}

bool IsBF16(const TensorView& view) {
  GLOAM_CHECK(view.device == Device::kCuda);
  GLOAM_CHECK(view.dtype == DType::kBF16 || view.dtype == DType::kF32);
  return view.dtype == DType::kBF16;
}

void* ElementAt(const TensorView& view, int64_t row, int64_t col) {
  return static_cast<char*>(view.data) +
         (row * view.strides[0] + col) * static_cast<int64_t>(DTypeBytes(view.dtype));
}

// y: a row for each of x's.
PlainProduct ProductOf(const TensorView& x, const DeviceMatrix& matrix, const TensorView& y) {
  GLOAM_CHECK(matrix.cols == x.shape[1] && y.shape[0] == x.shape[0]);
  return {.x = x.data,
          .x_stride = x.strides[0],
          .w = matrix.data,
          .y = y.data,
          .y_stride = y.strides[0],
          .m = x.shape[0],
          .n = y.shape[1],
          .k = matrix.cols,
          .y_is_bf16 = IsBF16(y)};
}

PlainProduct ProductOf(const TensorView& x, const GemmOutput& output) {
  const DeviceMatrix& matrix = MatrixOf(output.weight);
  GLOAM_CHECK(output.y.shape[1] == matrix.rows);
  PlainProduct product = ProductOf(x, matrix, output.y);
  product.bias = output.bias;
  product.accumulate = output.accumulate;
  return product;
}

bool ShareLaunch(const DeviceMatrix& a, const DeviceMatrix& b) {
  return a.format == b.format && a.type == b.type;
}

class CudaGemm final : public GemmBackend {
 public:
  explicit CudaGemm(const DeviceContext& context)
      : context_(context),
        stream_device_({.num_sms = context.num_sms,
                        .max_shared_bytes = context.max_shared_bytes,
                        .has_clusters = context.compute_capability >= 90,
                        .same_sums = context.options.batch_invariant,
                        .stream = context.stream}) {}

  // A model is complete when its step is reserved: what loading needed goes.
  Status Reserve(const StepLimits&) override {
    uploader_.reset();
    return OkStatus();
  }

  StatusOr<std::unique_ptr<Weight>> LoadWeight(std::span<const RawWeight> parts) override {
    GLOAM_CHECK(!parts.empty());
    GLOAM_RETURN_IF_ERROR(PrepareLarge(IsQuantized(parts[0].type) || context_.options.fp8_weights));
    if (uploader_ == nullptr) uploader_ = std::make_unique<WeightUploader>();
    const WeightType type = parts[0].type;
    DeviceMatrix matrix = {.type = type, .cols = parts[0].cols};
    for (const RawWeight& part : parts) {
      GLOAM_CHECK(part.type == type && part.cols == matrix.cols);
      matrix.rows += part.rows;
    }
    GLOAM_CHECK(matrix.cols % kRunElements == 0);
    if (IsQuantized(type)) return LoadQuantized(parts, matrix);
    return context_.options.fp8_weights ? LoadFP8(parts, matrix) : LoadFloats(parts, matrix);
  }

  void Embed(const EmbedParams& params) override {
    const DeviceMatrix& matrix = MatrixOf(params.table);
    const int64_t num_tokens = params.out.shape[0];
    GLOAM_CHECK(params.out.rank == 2 && params.out.shape[1] == matrix.cols);
    if (num_tokens == 0) return;
    const auto embed = matrix.format == DeviceFormat::kFP8 ? EmbedFP8 : EmbedRows;
    embed(matrix, params.token_ids, num_tokens, params.out.data, params.out.strides[0],
          IsBF16(params.out), context_.stream);
  }

  void Gemm(const GemmParams& params) override {
    GLOAM_CHECK(params.num_outputs >= 1 && params.num_outputs <= GemmParams::kMaxOutputs);
    GLOAM_CHECK(params.x.rank == 2 && IsBF16(params.x));
    GLOAM_CHECK(reinterpret_cast<uintptr_t>(params.x.data) % 16 == 0 &&
                params.x.strides[0] % 8 == 0);
    if (params.x.shape[0] == 0) return;
    std::array<bool, GemmParams::kMaxOutputs> is_done = {};
    for (int i = 0; i < params.num_outputs; ++i) {
      if (is_done[i]) continue;
      const DeviceMatrix& first = MatrixOf(params.outputs[i].weight);
      if (IsOrdered(first, params.x.shape[0], MostOrdered(first, params.x.shape[0]))) {
        MultiplyInOrder(params.x, params.outputs[i]);
        continue;
      }
      if (!IsStreamed(first, params.x.shape[0])) {
        MultiplyLarge(params.x, params.outputs[i]);
        continue;
      }
      std::array<const GemmOutput*, GemmParams::kMaxOutputs> together = {};
      int count = 0;
      for (int j = i; j < params.num_outputs; ++j) {
        if (is_done[j] || !ShareLaunch(first, MatrixOf(params.outputs[j].weight))) continue;
        is_done[j] = true;
        together[count++] = &params.outputs[j];
      }
      MultiplyStreamed(params.x, std::span(together.data(), count));
    }
  }

  std::optional<LogitRows> GreedyLogits(
      [[maybe_unused]] const GreedyLogitsParams& params) override {
#if GLOAM_WITH_HOPPER_KERNELS
    const DeviceMatrix& matrix = MatrixOf(params.weight);
    const int64_t m = params.x.shape[0];
    GLOAM_CHECK(params.x.rank == 2 && IsBF16(params.x) && !IsBF16(params.y));
    GLOAM_CHECK(params.y.shape[1] == matrix.rows && params.y.strides[0] == matrix.rows);
    if (m == 0 || m > kMaxOrderedGreedy || matrix.rows < kMinGreedyRows ||
        !IsOrdered(matrix, m, kMaxOrderedGreedy)) {
      return std::nullopt;
    }
    return FindLargest(ProductOf(params.x, matrix, params.y), context_.num_sms, context_.stream);
#else
    return std::nullopt;
#endif
  }

  bool GatedGemm([[maybe_unused]] const GatedGemmParams& params) override {
#if GLOAM_WITH_HOPPER_KERNELS
    const DeviceMatrix& matrix = MatrixOf(params.weight);
    const TensorView& x = params.x;
    const TensorView& y = params.y;
    GLOAM_CHECK(x.rank == 2 && IsBF16(x) && matrix.cols == x.shape[1]);
    GLOAM_CHECK(y.rank == 2 && IsBF16(y) && y.shape[0] == x.shape[0]);
    GLOAM_CHECK(2 * y.shape[1] == matrix.rows);
    if (context_.compute_capability != 90 || matrix.format != DeviceFormat::kBF16) return false;
    const PlainProduct product = ProductOf(x, matrix, y);
    if (IsOrdered(matrix, product.m, kMaxOrderedGated)) {
      if (product.n % 8 != 0) return false;
      MultiplyOrderedGated(product, context_.num_sms, context_.stream);
      return true;
    }
    if (IsStreamed(matrix, product.m)) return false;
    if (product.m < kMinGated || product.n % kGatedColumns != 0 ||
        product.k % kGatedChannels != 0) {
      return false;
    }
    MultiplyGated(product, context_.num_sms, context_.stream);
    return true;
#else
    return false;
#endif
  }

 private:
  bool IsStreamed(const DeviceMatrix& matrix, int64_t m) const {
    if (context_.options.batch_invariant) return true;
    switch (matrix.format) {
      case DeviceFormat::kBF16:
        return m <= kMaxStreamedBF16;
      case DeviceFormat::kFP8:
        return m <= kMaxStreamedFP8;
      case DeviceFormat::kQuantized:
        break;
    }
    return m <= kMaxStreamedQuantized;
  }

  static int64_t MostOrdered(const DeviceMatrix& matrix, int64_t m) {
    const bool is_long = matrix.rows <= kMaxPartedRows && matrix.cols >= 2 * matrix.rows;
    return is_long && m % 64 != 0 ? kMaxOrderedLong : kMaxOrdered;
  }

  // `most`: rows in normal mode.
  bool IsOrdered(const DeviceMatrix& matrix, int64_t m, int64_t most) const {
    if (!GLOAM_WITH_HOPPER_KERNELS || context_.compute_capability != 90 ||
        matrix.format != DeviceFormat::kBF16) {
      return false;
    }
    return context_.options.batch_invariant ||
           (m >= kMinOrdered && m <= most && matrix.rows * matrix.cols >= kMinOrderedElements);
  }

  Status PrepareLarge(bool dequantizes) {
    if (context_.options.batch_invariant) return OkStatus();
    if (cublas_ == nullptr) {
      GLOAM_ASSIGN_OR_RETURN(cublas_, CublasLt::Load());
      GLOAM_ASSIGN_OR_RETURN(workspace_, AllocateDevice(CublasLt::kWorkspaceBytes));
    }
    if (dequantizes && scratch_.data() == nullptr) {
      GLOAM_ASSIGN_OR_RETURN(scratch_, AllocateDevice(kScratchBytes));
    }
    return OkStatus();
  }

  StatusOr<std::unique_ptr<Weight>> LoadFloats(std::span<const RawWeight> parts,
                                               DeviceMatrix matrix) {
    const WeightType type = matrix.type;
    matrix.format = DeviceFormat::kBF16;
    matrix.type = WeightType::kBF16;
    GLOAM_ASSIGN_OR_RETURN(Buffer data, AllocateDevice(matrix.rows * matrix.cols * 2));
    matrix.data = data.data();
    auto* out = static_cast<uint16_t*>(data.data());
    const auto convert = [&](const void* raw, int64_t first_row, int64_t num_rows,
                             cudaStream_t stream) {
      ConvertToBF16(type, raw, out + first_row * matrix.cols, num_rows * matrix.cols, stream);
    };
    GLOAM_RETURN_IF_ERROR(uploader_->Upload(
        parts, 1, type == WeightType::kBF16 ? data.data() : nullptr, convert, context_.stream));
    return std::make_unique<DeviceWeight>(type, matrix, std::move(data));
  }

  StatusOr<std::unique_ptr<Weight>> LoadQuantized(std::span<const RawWeight> parts,
                                                  DeviceMatrix matrix) {
    matrix.format = DeviceFormat::kQuantized;
    GLOAM_ASSIGN_OR_RETURN(Buffer data,
                           AllocateDevice(PackedBytes(matrix.type, matrix.rows, matrix.cols)));
    matrix.data = data.data();
    const auto pack = [&](const void* raw, int64_t first_row, int64_t num_rows,
                          cudaStream_t stream) {
      PackQuantized(matrix.type, raw, first_row, num_rows, matrix.cols, data.data(), stream);
    };
    GLOAM_RETURN_IF_ERROR(uploader_->Upload(parts, kUnitRows, nullptr, pack, context_.stream));
    return std::make_unique<DeviceWeight>(matrix.type, matrix, std::move(data));
  }

  StatusOr<std::unique_ptr<Weight>> LoadFP8(std::span<const RawWeight> parts, DeviceMatrix matrix) {
    const WeightType type = matrix.type;
    matrix.format = DeviceFormat::kFP8;
    matrix.type = WeightType::kBF16;
    GLOAM_ASSIGN_OR_RETURN(Buffer data, AllocateDevice(FP8Bytes(matrix.rows, matrix.cols)));
    GLOAM_ASSIGN_OR_RETURN(Buffer scales, AllocateDevice(matrix.rows * sizeof(float)));
    matrix.data = data.data();
    matrix.row_scales = static_cast<const float*>(scales.data());
    const auto pack = [&](const void* raw, int64_t first_row, int64_t num_rows,
                          cudaStream_t stream) {
      PackFP8(type, raw, first_row, num_rows, matrix.cols, data.data(),
              static_cast<float*>(scales.data()), stream);
    };
    GLOAM_RETURN_IF_ERROR(uploader_->Upload(parts, kUnitRows, nullptr, pack, context_.stream));
    return std::make_unique<DeviceWeight>(type, matrix, std::move(data), std::move(scales));
  }

  void MultiplyStreamed(const TensorView& x, std::span<const GemmOutput* const> outputs) {
    StreamGemmParams params;
    params.x = x.data;
    params.m = static_cast<int>(x.shape[0]);
    params.k = static_cast<int>(x.shape[1]);
    params.x_stride = x.strides[0];
    params.num_segments = static_cast<int>(outputs.size());
    for (int i = 0; i < params.num_segments; ++i) {
      const DeviceMatrix& matrix = MatrixOf(outputs[i]->weight);
      GLOAM_CHECK(matrix.cols == x.shape[1]);
      GLOAM_CHECK(outputs[i]->y.shape[0] == x.shape[0] && outputs[i]->y.shape[1] == matrix.rows);
      params.segments[i] = {.weight = matrix.data,
                            .row_scales = matrix.row_scales,
                            .bias = outputs[i]->bias,
                            .y = outputs[i]->y.data,
                            .y_stride = outputs[i]->y.strides[0],
                            .rows = static_cast<int>(matrix.rows),
                            .first_unit = params.num_units,
                            .y_is_bf16 = IsBF16(outputs[i]->y),
                            .accumulate = outputs[i]->accumulate};
      params.num_units += static_cast<int>((matrix.rows + kUnitRows - 1) / kUnitRows);
    }
    const DeviceMatrix& first = MatrixOf(outputs[0]->weight);
    if (first.format == DeviceFormat::kBF16) {
      StreamGemmBF16(params, stream_device_);
    } else if (first.format == DeviceFormat::kFP8) {
      StreamGemmFP8(params, stream_device_);
    } else if (params.m > 1 || stream_device_.same_sums || !stream_device_.has_clusters ||
               !RowGemmQuantized(first.type, params, stream_device_)) {
      StreamGemmQuantized(first.type, params, stream_device_);
    }
  }

  void MultiplyInOrder([[maybe_unused]] const TensorView& x,
                       [[maybe_unused]] const GemmOutput& output) {
#if GLOAM_WITH_HOPPER_KERNELS
    MultiplyOrdered(ProductOf(x, output), context_.num_sms, context_.stream);
#endif
  }

  void MultiplyLarge(const TensorView& x, const GemmOutput& output) {
    const DeviceMatrix& matrix = MatrixOf(output.weight);
    PlainProduct product = ProductOf(x, output);
    if (product.bias != nullptr && product.y_is_bf16) {
      BroadcastBias(product.bias, product.y, product.y_stride, true, product.accumulate, product.m,
                    product.n, context_.stream);
      product.bias = nullptr;
      product.accumulate = true;
    }
    if (matrix.format == DeviceFormat::kBF16) {
      cublas_->Multiply(product, workspace_.data(), context_.stream);
      return;
    }
    const auto scratch_rows =
        static_cast<int64_t>(kScratchBytes) / (2 * matrix.cols) / kUnitRows * kUnitRows;
    for (int64_t row = 0; row < matrix.rows; row += scratch_rows) {
      PlainProduct piece = product;
      piece.n = std::min(scratch_rows, matrix.rows - row);
      piece.w = scratch_.data();
      piece.y = ElementAt(output.y, 0, row);
      if (product.bias != nullptr) piece.bias = product.bias + row;
      const auto dequantize = matrix.format == DeviceFormat::kFP8 ? DequantizeFP8 : Dequantize;
      dequantize(matrix, row, piece.n, scratch_.data(), context_.stream);
      cublas_->Multiply(piece, workspace_.data(), context_.stream);
    }
  }

  const DeviceContext context_;
  const StreamGemmDevice stream_device_;
  std::unique_ptr<CublasLt> cublas_;          // null in batch-invariant mode
  Buffer workspace_;                          // cuBLASLt's
  Buffer scratch_;                            // rows of a quantised weight as bf16
  std::unique_ptr<WeightUploader> uploader_;  // while a model loads
};

}  // namespace

std::unique_ptr<GemmBackend> MakeGemmBackend(const DeviceContext& context) {
  return std::make_unique<CudaGemm>(context);
}

}  // namespace gloam::cuda
