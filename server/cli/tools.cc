// `gloam pull`, `gloam inspect`, `gloam doctor`, `gloam health`.
#include <unistd.h>

#include <filesystem>
#include <iostream>

#include "boost/asio/io_context.hpp"
#include "boost/asio/ip/tcp.hpp"
#include "boost/version.hpp"
#include "google/protobuf/stubs/common.h"
#include "grpcpp/grpcpp.h"
#include "kernels/cuda_info.h"
#include "models/catalog.h"
#include "models/inspect.h"
#include "models/pull.h"
#include "models/pull_printer.h"
#include "server/cli/cli.h"
#include "server/cli/system_info.h"
#include "server/http/client.h"
#include "server/version.h"

namespace gloam {
namespace {

constexpr double kGibibyte = 1024.0 * 1024 * 1024;

bool IsPortFree(const std::string& host, int port) {
  using boost::asio::ip::tcp;
  boost::asio::io_context context;
  boost::system::error_code error;
  const auto address = boost::asio::ip::make_address(host, error);
  if (error) return false;
  tcp::acceptor acceptor(context);
  const tcp::endpoint endpoint(address, static_cast<uint16_t>(port));
  acceptor.open(endpoint.protocol(), error);
  if (!error) acceptor.set_option(tcp::acceptor::reuse_address(true), error);
  if (!error) acceptor.bind(endpoint, error);
  return !error;
}

void Row(const char* name, const std::string& value) { fmt::print("{:<16} {}\n", name, value); }

void ShowModels() {
  const auto folder = DefaultModelFolder();
  if (!folder.ok()) {
    Row("model folder", MessageOf(folder.status()));
    return;
  }
  std::error_code error;
  const auto space = std::filesystem::space(
      std::filesystem::exists(*folder, error) ? *folder : folder->root_path(), error);
  Row("model folder", fmt::format("{} ({:.1f} GiB free)", folder->string(),
                                  static_cast<double>(space.available) / kGibibyte));
  for (const CatalogEntry& entry : BuiltInCatalog().models) {
    const auto resolved = ResolveModel(entry.name);
    const bool present = resolved.ok() && resolved->present;
    fmt::print("  {:<30} {}\n", entry.name,
               present ? "present" : fmt::format("not here: gloam pull {}", entry.name));
  }
}

}  // namespace

int RunPull(const std::string& name) {
  const auto entry = BuiltInCatalog().Find(name);
  if (!entry.ok()) return Fail(entry.status());
  PullOptions options;
  auto folder = DefaultModelFolder();
  if (!folder.ok()) return Fail(folder.status());
  options.folder = *folder;
  PullPrinter printer(std::cerr, isatty(STDERR_FILENO) != 0);
  options.progress = [&](const PullProgress& progress) { printer.Show(progress); };
  const auto path = PullModel(**entry, options);
  printer.Finish();
  if (!path.ok()) return Fail(path.status());
  fmt::print("{}\n", path->string());
  return 0;
}

int RunInspect(const std::string& model, bool list_tensors) {
  const auto resolved = ResolveModel(model);
  if (!resolved.ok()) return Fail(resolved.status());
  if (!resolved->present) {
    return Fail(NotFound("{} is not here yet: gloam pull {}", model, model));
  }
  const auto file = ModelFile::Open(resolved->path);
  if (!file.ok()) return Fail(file.status());
  InspectModel(**file, {.list_tensors = list_tensors}, std::cout);
  return 0;
}

int RunHealth(const ServeOptions& options) {
  const std::string host = options.host == "0.0.0.0" ? "127.0.0.1" : options.host;
  auto client = HttpClient::Connect(fmt::format("http://{}:{}", host, options.port), "");
  if (!client.ok()) return Fail(client.status());
  const auto body = (*client)->Get("/ready");
  return body.ok() ? 0 : Fail(body.status());
}

int RunDoctor(const ServeOptions& options) {
  Row("gloam", kVersion);
  Row("CPU", CpuModelName());
  Row("CPU features", CpuFeatures());
  Row("cores", fmt::format("{} usable by this process", UsableCores()));
  Row("memory", fmt::format("{:.1f} GiB free of {:.1f} GiB",
                            static_cast<double>(AvailableMemoryBytes()) / kGibibyte,
                            static_cast<double>(TotalMemoryBytes()) / kGibibyte));
  for (const auto& [name, fact] : DescribeCuda()) Row(name.c_str(), fact);
  Row("open files", fmt::format("up to {}", RaiseFileDescriptorLimit()));
  for (const int port : {options.port, options.grpc_port}) {
    Row("port", fmt::format("{}:{} is {}", options.host, port,
                            IsPortFree(options.host, port) ? "free" : "taken"));
  }
  ShowModels();
  Row("libraries",
      fmt::format("gRPC {}, Protobuf {}.{}.{}, Boost {}.{}", grpc::Version(),
                  GOOGLE_PROTOBUF_VERSION / 1000000, GOOGLE_PROTOBUF_VERSION / 1000 % 1000,
                  GOOGLE_PROTOBUF_VERSION % 1000, BOOST_VERSION / 100000,
                  BOOST_VERSION / 100 % 1000));
  return 0;
}

}  // namespace gloam
