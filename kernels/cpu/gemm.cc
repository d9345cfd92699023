// Matrix products and the embedding: checks, quantisation of the activations, and the split of the
// work into panels for the threads. The arithmetic is in gemm_kernels.cc.
#include <algorithm>
#include <array>

#include "base/check.h"
#include "kernels/cpu/cpu_kernels.h"
#include "kernels/cpu/gemm_kernels.h"
#include "kernels/cpu/packed_weight.h"

namespace gloam::cpu {
namespace {

// Pieces per thread: enough that threads finish together, few enough that taking one stays cheap.
constexpr int64_t kPiecesPerThread = 8;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

const PackedWeight& Packed(const GemmOutput& output) {
  return static_cast<const PackedWeight&>(*output.weight);
}

void CheckShapes(const GemmParams& params) {
  const TensorView& x = params.x;
  GLOAM_CHECK(x.device == Device::kCpu && x.dtype == DType::kF32 && x.rank == 2);
  GLOAM_CHECK(x.strides[1] == 1);
  GLOAM_CHECK(params.num_outputs >= 1 && params.num_outputs <= GemmParams::kMaxOutputs);
  for (int i = 0; i < params.num_outputs; ++i) {
    const GemmOutput& output = params.outputs[i];
    GLOAM_CHECK(output.weight != nullptr && output.weight->cols() == x.shape[1]);
    GLOAM_CHECK(output.y.device == Device::kCpu && output.y.dtype == DType::kF32);
    GLOAM_CHECK(output.y.rank == 2 && output.y.strides[1] == 1);
    GLOAM_CHECK(output.y.shape[0] == x.shape[0] && output.y.shape[1] == output.weight->rows());
  }
}

// Activations as int8 and, where asked for, what that rounding left out as int8 again: together
// 16 bits.
struct QuantizedActivations {
  QuantizedRows rows, residual;
};

QuantizedActivations QuantizeActivations(const TensorView& x, bool with_residual, ThreadPool& pool,
                                         Scratch& scratch) {
  const int64_t num_rows = x.shape[0];
  const int64_t cols = x.shape[1];
  const int64_t num_blocks = cols / kRunElements;
  const int64_t num_parts = with_residual ? 2 : 1;
  const int64_t part_blocks = num_rows * num_blocks;
  const int64_t num_floats = with_residual ? num_rows * cols : 0;
  auto* blocks = static_cast<ActivationBlock*>(
      scratch.Get(num_parts * (part_blocks * sizeof(ActivationBlock) + num_rows * cols) +
                  num_floats * sizeof(float)));
  auto* residuals = reinterpret_cast<float*>(blocks + num_parts * part_blocks);
  auto* quants = reinterpret_cast<int8_t*>(residuals + num_floats);
  const auto* in = x.Data<const float>();
  // A piece of 16K elements takes about 2 us: less is not worth a second thread.
  const int64_t rows_per_piece = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, cols));
  pool.ParallelFor(CeilDiv(num_rows, rows_per_piece), [&](int64_t piece, int) {
    const int64_t end = std::min(num_rows, (piece + 1) * rows_per_piece);
    for (int64_t row = piece * rows_per_piece; row < end; ++row) {
      const float* from = in + row * x.strides[0];
      int8_t* row_quants = quants + row * cols;
      ActivationBlock* row_blocks = blocks + row * num_blocks;
      QuantizeRow(from, cols, row_quants, row_blocks);
      if (!with_residual) continue;
      float* residual = residuals + row * cols;
      for (int64_t i = 0; i < cols; ++i) {
        residual[i] = from[i] - row_blocks[i / kRunElements].scale * row_quants[i];
      }
      QuantizeRow(residual, cols, row_quants + num_rows * cols, row_blocks + part_blocks);
    }
  });
  return {{quants, blocks, cols}, {quants + num_rows * cols, blocks + part_blocks, cols}};
}

}  // namespace

void Gemm(const GemmParams& params, CpuActivations activations, ThreadPool& pool,
          Scratch& scratch) {
  CheckShapes(params);
  const TensorView& x = params.x;
  const int64_t num_rows = x.shape[0];
  if (num_rows == 0) return;

  bool quantize = false;
  std::array<bool, GemmParams::kMaxOutputs> int8 = {};
  std::array<int64_t, GemmParams::kMaxOutputs + 1> first_panel = {};
  for (int i = 0; i < params.num_outputs; ++i) {
    const PackedWeight& weight = Packed(params.outputs[i]);
    int8[i] = activations == CpuActivations::kInt8 && IsQuantized(weight.type());
    quantize = quantize || int8[i];
    first_panel[i + 1] = first_panel[i] + weight.num_panels();
  }
  const QuantizedActivations quantized =
      quantize ? QuantizeActivations(x, params.precise, pool, scratch) : QuantizedActivations{};

  const auto multiply = [&](int64_t panel, int64_t row, int rows) {
    int i = 0;
    while (panel >= first_panel[i + 1]) ++i;
    panel -= first_panel[i];
    const GemmOutput& output = params.outputs[i];
    const PackedWeight& weight = Packed(output);
    const int64_t col = panel * kPanelRows;
    PanelOutput out;
    out.y = output.y.Data<float>() + row * output.y.strides[0] + col;
    out.row_stride = output.y.strides[0];
    out.num_cols = static_cast<int>(std::min<int64_t>(kPanelRows, weight.rows() - col));
    out.bias = output.bias == nullptr ? nullptr : output.bias + col;
    out.accumulate = output.accumulate;
    if (int8[i]) {
      MultiplyPanelInt8(weight, panel, quantized.rows.Skip(row), rows, out);
      if (params.precise) {
        out.bias = nullptr;
        out.accumulate = true;
        MultiplyPanelInt8(weight, panel, quantized.residual.Skip(row), rows, out);
      }
    } else {
      MultiplyPanelF32(weight, panel, x.Data<const float>() + row * x.strides[0], x.strides[0],
                       rows, out);
    }
  };

  // Pieces are neighbouring panels times a block of rows. Row blocks are the outer order, so that
  // their activations stay in the L2 cache while the panels pass.
  const int64_t num_panels = first_panel[params.num_outputs];
  constexpr int64_t kRowGrain = 8;  // a multiple of the kernels' tiles
  const int64_t rows_per_block =
      CeilDiv(CeilDiv(num_rows, CeilDiv(num_rows, kMaxRowsPerCall)), kRowGrain) * kRowGrain;
  const int64_t num_row_blocks = CeilDiv(num_rows, rows_per_block);
  const int64_t wanted_pieces = CeilDiv(kPiecesPerThread * pool.num_threads(), num_row_blocks);
  const int64_t panels_per_piece = CeilDiv(num_panels, wanted_pieces);
  const int64_t pieces_per_block = CeilDiv(num_panels, panels_per_piece);
  pool.ParallelFor(num_row_blocks * pieces_per_block, [&](int64_t piece, int) {
    const int64_t row = piece / pieces_per_block * rows_per_block;
    const int rows = static_cast<int>(std::min(rows_per_block, num_rows - row));
    const int64_t begin = piece % pieces_per_block * panels_per_piece;
    const int64_t end = std::min(num_panels, begin + panels_per_piece);
    for (int64_t panel = begin; panel < end; ++panel) multiply(panel, row, rows);
  });
}

void Embed(const EmbedParams& params, ThreadPool& pool) {
  const TensorView& out = params.out;
  const auto& table = static_cast<const PackedWeight&>(*params.table);
  GLOAM_CHECK(out.device == Device::kCpu && out.dtype == DType::kF32 && out.rank == 2);
  GLOAM_CHECK(out.strides[1] == 1 && out.shape[1] == table.cols());
  constexpr int64_t kTokensPerPiece = 8;
  const int64_t num_tokens = out.shape[0];
  pool.ParallelFor(CeilDiv(num_tokens, kTokensPerPiece), [&](int64_t piece, int) {
    const int64_t end = std::min(num_tokens, (piece + 1) * kTokensPerPiece);
    for (int64_t i = piece * kTokensPerPiece; i < end; ++i) {
      const int32_t token = params.token_ids[i];
      GLOAM_CHECK(token >= 0 && token < table.rows());
      UnpackRow(table, token, out.Data<float>() + i * out.strides[0]);
    }
  });
}

}  // namespace gloam::cpu
