// Matrix products, greedy logits and the embedding: checks, quantisation of the activations, and
// the split of the work into panels for the threads. The arithmetic is in kernels.cc.
#include <algorithm>
#include <array>
#include <limits>
#include <optional>

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

const PackedWeight& Packed(const Weight& weight) {
  return static_cast<const PackedWeight&>(weight);
}

void CheckMatrix(const TensorView& x) {
  GLOAM_CHECK(x.device == Device::kCpu && x.dtype == DType::kF32 && x.rank == 2);
  GLOAM_CHECK(x.strides[1] == 1);
}

void CheckShapes(const TensorView& x, const Weight* weight, const TensorView& y) {
  CheckMatrix(x);
  CheckMatrix(y);
  GLOAM_CHECK(weight != nullptr && weight->cols() == x.shape[1]);
  GLOAM_CHECK(y.shape[0] == x.shape[0] && y.shape[1] == weight->rows());
}

// The rows that products share: as they are, and as integers where some weight wants those.
class Activations {
 public:
  Activations(const TensorView& x, CpuActivations kind, bool precise, ThreadPool& pool)
      : x_(x), kind_(kind), precise_(precise), pool_(pool) {}

  void QuantizeFor(const Weight& weight, Scratch& scratch);

  // Calls multiply(panel, next_panel, row, num_rows, thread) for all of `num_panels` panels and all
  // rows, some at a time. The thread's next panel is a guess, or `num_panels`: there is none.
  template <typename F>
  void ForPanels(int64_t num_panels, const F& multiply) const;

  // A panel of a weight that QuantizeFor has seen, times some rows. `next` is read next.
  void MultiplyPanel(const PackedWeight& weight, int64_t panel, const PackedBytes& next,
                     int64_t row, int num_rows, PanelOutput out) const;

 private:
  bool AsIntegers(const Weight& weight) const {
    return kind_ == CpuActivations::kInt8 && IsQuantized(weight.type());
  }
  int64_t num_rows() const { return x_.shape[0]; }
  // With `precise` each row is followed by what its rounding left out, as int8 again: together 16
  // bits.
  int rows_per_row() const { return precise_ ? 2 : 1; }
  bool has_few_rows() const { return num_rows() * rows_per_row() <= kFewRows; }

  const TensorView& x_;
  const CpuActivations kind_;
  const bool precise_;
  ThreadPool& pool_;
  QuantizedRows quantized_;
};

void Activations::QuantizeFor(const Weight& weight, Scratch& scratch) {
  if (!AsIntegers(weight) || quantized_.data != nullptr) return;
  const int64_t cols = x_.shape[1];
  const int64_t num_quantized = num_rows() * rows_per_row();
  quantized_.num_runs = cols / kRunElements;
  quantized_.group_rows = has_few_rows() ? static_cast<int>(num_quantized) : kRowGroup;
  const int64_t num_groups = CeilDiv(num_quantized, quantized_.group_rows);
  quantized_.data = static_cast<std::byte*>(scratch.Get(
      num_groups * quantized_.group_rows * quantized_.num_runs * QuantizedRows::kBytesPerRun));
  const auto* in = x_.Data<const float>();
  // Rows of a group share cache lines.
  const int64_t rows_per_group = quantized_.group_rows / rows_per_row();
  ForRows(pool_, num_groups, rows_per_group * cols, kQuantizeGrain,
          [&](int64_t begin, int64_t end) {
            const int64_t end_row = std::min(num_rows(), end * rows_per_group);
            for (int64_t row = begin * rows_per_group; row < end_row; ++row) {
              QuantizeRow(in + row * x_.strides[0], precise_, quantized_, row * rows_per_row());
            }
          });
}

// Pieces are neighbouring panels times a block of rows. Row blocks are the outer order, so that
// their activations stay in the L2 cache while the panels pass.
template <typename F>
void Activations::ForPanels(int64_t num_panels, const F& multiply) const {
  const int64_t num_full_blocks = CeilDiv(num_rows(), kMaxRowsPerCall / rows_per_row());
  const int64_t rows_per_block =
      CeilDiv(CeilDiv(num_rows(), num_full_blocks), kRowGroup) * kRowGroup;
  const int64_t num_row_blocks = CeilDiv(num_rows(), rows_per_block);
  const int64_t pieces_per_thread = has_few_rows() ? kPiecesPerThreadFewRows : kPiecesPerThread;
  const int64_t wanted_pieces = CeilDiv(pieces_per_thread * pool_.num_threads(), num_row_blocks);
  int64_t panels_per_piece = CeilDiv(num_panels, wanted_pieces);
  if (!has_few_rows()) {
    const int64_t row_runs = rows_per_block * rows_per_row() * CeilDiv(x_.shape[1], kRunElements);
    panels_per_piece = std::clamp<int64_t>(kRowRunsPerPiece / row_runs, 1, panels_per_piece);
  }
  const int64_t pieces_per_block = CeilDiv(num_panels, panels_per_piece);
  const int64_t num_pieces = num_row_blocks * pieces_per_block;
  pool_.ParallelFor(num_pieces, [&](int64_t piece, int thread) {
    const int64_t row = piece / pieces_per_block * rows_per_block;
    const int rows = static_cast<int>(std::min(rows_per_block, num_rows() - row));
    const int64_t begin = piece % pieces_per_block * panels_per_piece;
    const int64_t end = std::min(num_panels, begin + panels_per_piece);
    // Threads take pieces in turn.
    const int64_t next_piece = piece + pool_.num_threads();
    const int64_t next_begin =
        next_piece < num_pieces ? next_piece % pieces_per_block * panels_per_piece : num_panels;
    for (int64_t panel = begin; panel < end; ++panel) {
      multiply(panel, panel + 1 < end ? panel + 1 : next_begin, row, rows, thread);
    }
  });
}

void Activations::MultiplyPanel(const PackedWeight& weight, int64_t panel, const PackedBytes& next,
                                int64_t row, int num_rows, PanelOutput out) const {
  out.num_cols =
      static_cast<int>(std::min<int64_t>(kPanelRows, weight.rows() - panel * kPanelRows));
  if (AsIntegers(weight)) {
    out.precise = precise_;
    MultiplyPanelInt8(weight, panel, quantized_.Skip(row * rows_per_row()),
                      num_rows * rows_per_row(), next, out);
  } else {
    MultiplyPanelF32(weight, panel, x_.Data<const float>() + row * x_.strides[0], x_.strides[0],
                     num_rows, out);
  }
}

}  // namespace

void Gemm(const GemmParams& params, CpuActivations kind, ThreadPool& pool, Scratch& scratch) {
  GLOAM_CHECK(params.num_outputs >= 1 && params.num_outputs <= GemmParams::kMaxOutputs);
  for (int i = 0; i < params.num_outputs; ++i) {
    CheckShapes(params.x, params.outputs[i].weight, params.outputs[i].y);
  }
  if (params.x.shape[0] == 0) return;

  Activations activations(params.x, kind, params.precise, pool);
  std::array<int64_t, GemmParams::kMaxOutputs + 1> first_panel = {};
  for (int i = 0; i < params.num_outputs; ++i) {
    const PackedWeight& weight = Packed(*params.outputs[i].weight);
    activations.QuantizeFor(weight, scratch);
    first_panel[i + 1] = first_panel[i] + weight.num_panels();
  }
  const auto output_of = [&](int64_t panel) {
    int i = 0;
    while (panel >= first_panel[i + 1]) ++i;
    return i;
  };
  const int64_t num_panels = first_panel[params.num_outputs];
  activations.ForPanels(
      num_panels, [&](int64_t panel, int64_t next_panel, int64_t row, int num_rows, int) {
        PackedBytes next;
        if (next_panel < num_panels) {
          const int i = output_of(next_panel);
          next = Packed(*params.outputs[i].weight).PanelBytes(next_panel - first_panel[i]);
        }
        const int i = output_of(panel);
        panel -= first_panel[i];
        const GemmOutput& output = params.outputs[i];
        const int64_t col = panel * kPanelRows;
        PanelOutput out;
        out.y = output.y.Data<float>() + row * output.y.strides[0] + col;
        out.row_stride = output.y.strides[0];
        out.bias = output.bias == nullptr ? nullptr : output.bias + col;
        out.accumulate = output.accumulate;
        activations.MultiplyPanel(Packed(*output.weight), panel, next, row, num_rows, out);
      });
}

std::optional<LogitRows> GreedyLogits(const GreedyLogitsParams& params, CpuActivations kind,
                                      ThreadPool& pool, Scratch& scratch) {
  CheckShapes(params.x, params.weight, params.y);
  const int64_t num_rows = params.x.shape[0];
  const int64_t num_elements = num_rows * pool.num_threads();
  if (num_rows == 0 || 2 * num_elements > params.y.num_elements()) return std::nullopt;
  // What each thread has found, one thread after the other; then all of it in the first's.
  LargestResults largest = {params.y.Data<float>(), params.y.Data<int32_t>() + num_elements};
  std::fill_n(largest.values, num_elements, -std::numeric_limits<float>::infinity());
  std::fill_n(largest.columns, num_elements, 0);

  Activations activations(params.x, kind, /*precise=*/false, pool);
  const PackedWeight& weight = Packed(*params.weight);
  activations.QuantizeFor(weight, scratch);
  const int64_t num_panels = weight.num_panels();
  activations.ForPanels(num_panels,
                        [&](int64_t panel, int64_t next_panel, int64_t row, int rows, int thread) {
                          PackedBytes next;
                          if (next_panel < num_panels) next = weight.PanelBytes(next_panel);
                          PanelOutput out;
                          out.largest = largest.Skip(thread * num_rows + row);
                          activations.MultiplyPanel(weight, panel, next, row, rows, out);
                        });
  for (int64_t i = num_rows; i < num_elements; ++i) {
    largest.Skip(i % num_rows).Take(largest.values[i], largest.columns[i]);
  }
  return LogitRows{TensorView::Contiguous(largest.values, DType::kF32, Device::kCpu, {num_rows, 1}),
                   largest.columns};
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
