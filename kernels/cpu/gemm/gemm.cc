// Matrix products and the embedding: checks, quantisation of the activations, and the split of the
// work into panels for the threads. The arithmetic is in kernels.cc.
#include <algorithm>
#include <array>

#include "base/check.h"
#include "kernels/cpu/ceil_div.h"
#include "kernels/cpu/cpu_kernels.h"
#include "kernels/cpu/gemm/kernels.h"
#include "kernels/cpu/gemm/packed_weight.h"
#include "kernels/cpu/row_tasks.h"

namespace gloam::cpu {
namespace {

// Pieces per thread, at least: enough that threads finish together, few enough that taking one
// stays cheap. Few rows read each weight once: then long pieces, for the hardware's prefetchers.
constexpr int64_t kPiecesPerThread = 8;
constexpr int64_t kPiecesPerThreadFewRows = 2;
// Of more rows a piece has about so many rows times runs of a panel, which take some 10 us: what
// the last piece costs the other threads.
constexpr int64_t kRowRunsPerPiece = 2048;
// Activations that one thread quantises in 1 to 2 us; less is not worth a second thread.
constexpr int64_t kQuantizeGrain = 4096;

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

// The activations as int8; with `precise` each row is followed by what that rounding left out, as
// int8 again: together 16 bits.
QuantizedRows QuantizeActivations(const TensorView& x, bool precise, ThreadPool& pool,
                                  Scratch& scratch) {
  const int64_t num_rows = x.shape[0];
  const int64_t cols = x.shape[1];
  const int64_t rows_per_row = precise ? 2 : 1;
  QuantizedRows out;
  out.num_runs = cols / kRunElements;
  out.group_rows =
      num_rows * rows_per_row <= kFewRows ? static_cast<int>(num_rows * rows_per_row) : kRowGroup;
  const int64_t num_groups = CeilDiv(num_rows * rows_per_row, out.group_rows);
  out.data = static_cast<std::byte*>(
      scratch.Get(num_groups * out.group_rows * out.num_runs * QuantizedRows::kBytesPerRun));
  const auto* in = x.Data<const float>();
  // Rows of a group share cache lines.
  const int64_t rows_per_group = out.group_rows / rows_per_row;
  const int64_t group_elements = rows_per_group * cols;
  ForRows(pool, num_groups, group_elements, kQuantizeGrain, [&](int64_t begin, int64_t end) {
    const int64_t end_row = std::min(num_rows, end * rows_per_group);
    for (int64_t row = begin * rows_per_group; row < end_row; ++row) {
      QuantizeRow(in + row * x.strides[0], precise, out, row * rows_per_row);
    }
  });
  return out;
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
  const QuantizedRows quantized =
      quantize ? QuantizeActivations(x, params.precise, pool, scratch) : QuantizedRows{};
  const int rows_per_row = params.precise ? 2 : 1;

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
      out.precise = params.precise;
      MultiplyPanelInt8(weight, panel, quantized.Skip(row * rows_per_row), rows * rows_per_row,
                        out);
    } else {
      MultiplyPanelF32(weight, panel, x.Data<const float>() + row * x.strides[0], x.strides[0],
                       rows, out);
    }
  };

  // Pieces are neighbouring panels times a block of rows. Row blocks are the outer order, so that
  // their activations stay in the L2 cache while the panels pass.
  const int64_t num_panels = first_panel[params.num_outputs];
  const int64_t num_full_blocks = CeilDiv(num_rows, kMaxRowsPerCall / rows_per_row);
  const int64_t rows_per_block = CeilDiv(CeilDiv(num_rows, num_full_blocks), kRowGroup) * kRowGroup;
  const int64_t num_row_blocks = CeilDiv(num_rows, rows_per_block);
  const bool few_rows = num_rows * rows_per_row <= kFewRows;
  const int64_t pieces_per_thread = few_rows ? kPiecesPerThreadFewRows : kPiecesPerThread;
  const int64_t wanted_pieces = CeilDiv(pieces_per_thread * pool.num_threads(), num_row_blocks);
  int64_t panels_per_piece = CeilDiv(num_panels, wanted_pieces);
  if (!few_rows) {
    const int64_t row_runs = rows_per_block * rows_per_row * CeilDiv(x.shape[1], kRunElements);
    panels_per_piece = std::clamp<int64_t>(kRowRunsPerPiece / row_runs, 1, panels_per_piece);
  }
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
